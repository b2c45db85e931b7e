"""The tokenizer's objective: gradients, who learns from whom, phases, health."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gae_jax.config.validate import validate
from gae_jax.evaluation import health
from gae_jax.nn import losses
from gae_jax.objectives.objective import Objective, Targets
from gae_jax.runtime.errors import ConfigError
from gae_jax.stages import tokenizer
from gae_jax.train.accumulate import accumulate
from gae_jax.train.log import read_metrics
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import apply_gradients, make_state

TOKENS, WIDTH = 16, 32


def batch(size=4, seed=1):
    return jax.random.uniform(jax.random.key(seed), (size, 16, 16, 3), minval=-1)


def setup(config):
    """(objective, networks, state) of a config of the small size."""
    validate(config)
    section = config.tokenizer
    networks = tokenizer.make_networks(config)
    optimizers = {name: optax.sgd(0.1) for name in networks}
    state = make_state(jax.random.key(0), networks, optimizers)
    objective = Objective(
        section,
        tokenizer=networks["tokenizer"],
        discriminator=networks.get("discriminator"),
        aligner=networks.get("aligner"),
    )
    return objective, networks, state


def targets_for(config, images):
    """Something to align with, and a distance that needs no network."""
    width = config.tokenizer.model.latent_dim if config.tokenizer.align.point == "latent" else WIDTH
    aligned = jax.random.normal(jax.random.key(7), (len(images), TOKENS, width))
    return Targets(aligned=aligned, perceptual=lambda x: jnp.mean(jnp.square(x - images)))


PROGRAMS = {}  # text of a config -> (compiled gradients, networks, state)


def gradients(config, images, *, params=None):
    text = config.to_json_best_effort()
    if text not in PROGRAMS:
        objective, networks, state = setup(config)
        phase = tokenizer.phase_of(config.tokenizer, 10)
        PROGRAMS[text] = compiled(config, objective, state, phase), networks, state
    compute, networks, state = PROGRAMS[text]
    return compute(state.params if params is None else params, images), networks, state


def compiled(config, objective, state, phase):
    """The gradients as a function of parameters and images."""

    @jax.jit
    def compute(params, images):
        return objective.gradients(
            params,
            state.rest,
            images,
            targets_for(config, images),
            jax.random.key(5),
            jnp.float32(1),
            phase,
        )

    return compute


def plain_loss(config, networks, state, images, key):
    """The same objective as one function of the tokenizer's (and aligner's) parameters."""
    section, targets = config.tokenizer, targets_for(config, images)

    def loss(params):
        model = networks["tokenizer"](params["tokenizer"], state.rest["tokenizer"])
        encoded = model.encode_all(images)
        found = model.decode(model.perturbed(encoded.latents, jax.random.key(key), encoded.logvar))
        total = section.losses.l1 * losses.l1(found, images)
        total += section.losses.perceptual * targets.perceptual(found)
        judge = networks["discriminator"](
            state.params["discriminator"], state.rest["discriminator"]
        )
        total += section.losses.gan * losses.hinge_generator(judge(found, train=True))
        tokens = encoded.features
        if section.align.point != "pre":
            tokens = encoded.latents.reshape(len(images), TOKENS, -1)
        if "aligner" in params:
            tokens = networks["aligner"](params["aligner"], state.rest["aligner"])(tokens)
        if section.align.loss == "mse":
            total += section.losses.align * losses.mse(tokens, targets.aligned)
        elif section.align.loss == "vf":
            total += section.losses.align * losses.vf_loss(tokens, targets.aligned)
        if section.losses.kl:
            total += section.losses.kl * losses.gaussian_kl(encoded.latents, encoded.logvar)
        return total

    return loss


@pytest.mark.parametrize(
    "arm",
    [
        {},
        {"align.point": "pre"},
        {"align.point": "post", "align.loss": "vf"},
        {"model.bottleneck": "kl", "losses.kl": 0.1},
    ],
    ids=["latent", "pre", "post-vf", "kl"],
)
def test_gradients_are_those_of_the_weighted_sum(config, arm):
    config.tokenizer.losses.update(l1=0.7, perceptual=0.3, gan=0.2, align=0.4)
    for path, value in arm.items():
        section, leaf = path.split(".")
        config.tokenizer[section][leaf] = value
    images = batch()
    (grads, _, figures), networks, state = gradients(config, images)
    loss = plain_loss(config, networks, state, images, key=5)
    learners = {k: v for k, v in state.params.items() if k != "discriminator"}
    value, expected = jax.jit(jax.value_and_grad(loss))(learners)
    np.testing.assert_allclose(figures["total"], value, rtol=1e-5)
    for name in learners:
        for got, want in zip(
            jax.tree.leaves(grads[name]), jax.tree.leaves(expected[name]), strict=True
        ):
            np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max() + 1e-3))


def test_gradient_norms_are_those_at_the_last_layer(config):
    config.tokenizer.losses.update(l1=0.7, perceptual=0.0, gan=0.0, align=0.0)
    images = batch()
    (grads, _, figures), _, _ = gradients(config, images)
    kernel = grads["tokenizer"]["decoder"]["linear_out"]["kernel"]
    np.testing.assert_allclose(figures["last_layer/l1"], jnp.linalg.norm(kernel), rtol=1e-4)


def test_the_discriminator_learns_from_its_own_loss_only(config):
    images = batch()
    (grads, rest, _), networks, state = gradients(config, images)

    @jax.jit
    def reconstruct(images):
        model = networks["tokenizer"](state.params["tokenizer"], state.rest["tokenizer"])
        encoded = model.encode_all(images)
        return model.decode(model.perturbed(encoded.latents, jax.random.key(5), encoded.logvar))

    found = reconstruct(images)

    def loss(params):
        judge = networks["discriminator"](params, state.rest["discriminator"])
        return losses.hinge_discriminator(judge(images, train=True), judge(found, train=True))

    expected = jax.jit(jax.grad(loss))(state.params["discriminator"])
    for got, want in zip(
        jax.tree.leaves(grads["discriminator"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    before, after = jax.tree.leaves(state.rest["discriminator"]), jax.tree.leaves(rest)
    assert any(bool((a != b).any()) for a, b in zip(before, after, strict=True))


def test_the_generator_is_the_same_whether_the_discriminator_learns(config):
    images = batch()
    objective, _, state = setup(config)
    both = tokenizer.phase_of(config.tokenizer, 10)
    alone = type(both)(discriminator=False, gan=True, terms=both.terms)
    results = [
        compiled(config, objective, state, phase)(state.params, images)[0]
        for phase in (both, alone)
    ]
    assert "discriminator" not in results[1]
    # two programs: the compiler may round in another order
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-7)
    jax.tree.map(close, *(r["tokenizer"] for r in results))


def test_adaptive_weight_does_not_care_for_the_scale_of_the_discriminator(config):
    config.tokenizer.gan.weight = "adaptive"
    config.tokenizer.losses.update(gan=0.5)
    images = batch()
    _, networks, state = gradients(config, images)
    last = networks["discriminator"](
        state.params["discriminator"], state.rest["discriminator"]
    ).order[-1]
    found = []
    for scale in (100.0, 10_000.0):
        judge = state.params["discriminator"]
        main = judge["main"]
        scaled = {**main, last: jax.tree.map(lambda x, by=scale: x * by, main[last])}
        params = state.params | {"discriminator": {**judge, "main": scaled}}
        (grads, _, figures), _, _ = gradients(config, images, params=params)
        found.append(grads["tokenizer"])
        others = figures["last_layer/gan"] / 0.5
    small, large = map(jax.tree.leaves, found)
    for a, b in zip(small, large, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-2 * float(jnp.abs(a).max()))
    assert np.isfinite(others)
    assert others > 0


def test_each_network_is_updated_once_by_its_own_optimizer(config, small_run):
    from gae_jax.run.run import Run
    from gae_jax.run.session import Session
    from gae_jax.runtime.mesh import put_batch
    from gae_jax.train.fit import init_state, jit_step

    config.tokenizer.gan.update(start=0, discriminator_start=0, ramp=0)
    config.tokenizer.optim.warmup_steps = 0
    config.tokenizer.discriminator_optim.update(learning_rate=0.0, end_learning_rate=0.0)
    now = Session(config, Run(small_run), devices=tuple(jax.devices()[:1]))
    stage = tokenizer.make_stage(now)
    step, shardings = jit_step(stage, now.mesh)
    state = init_state(stage, shardings, 0)
    before = jax.device_get(state.params)
    images = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3), np.uint8)
    state, figures = step(
        state, put_batch({"image": images}, now.mesh), jax.random.key(0), stage.frozen,
        stage.phase(0),
    )  # fmt: skip
    for name in ("tokenizer", "discriminator"):
        counts = {int(x) for x in jax.tree.leaves(state.opt[name]) if x.dtype == jnp.int32}
        assert counts == {1}, name
    jax.tree.map(
        np.testing.assert_array_equal, before["discriminator"], state.params["discriminator"]
    )
    now = state.params["tokenizer"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before["tokenizer"], now)
    assert all(jax.tree.leaves(moved))
    assert "discriminator/accuracy" in figures


def test_parts_of_a_batch_give_the_gradients_of_the_whole(config):
    config.tokenizer.model.noise_std = 0.0
    config.tokenizer.losses.update(gan=0.0, align=0.0)
    objective, _, state = setup(config)
    phase = tokenizer.phase_of(config.tokenizer, 0)

    def gradients(images, rest, key):
        targets = Targets(None, lambda x: jnp.mean(jnp.square(x - images)))
        return objective.gradients(
            state.params, state.rest, images, targets, key, jnp.float32(1), phase
        )

    images = batch(8)
    whole = jax.jit(lambda x: accumulate(gradients, x, None, jax.random.key(0), 1))(images)
    parts = jax.jit(lambda x: accumulate(gradients, x, None, jax.random.key(0), 4))(images)
    for a, b in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(parts[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(whole[2]["l1"], parts[2]["l1"], rtol=1e-5)


def test_what_does_not_learn_stays_bit_for_bit(config):
    (grads, _, _), networks, _ = gradients(config, batch())
    optimizer = make_optimizer(
        10, learning_rate=0.1, end_learning_rate=0.1, warmup_steps=0, b1=0.9, b2=0.9,
        weight_decay=0.5, clip_norm=0.0,
    )  # fmt: skip
    only = {"tokenizer": networks["tokenizer"]}
    state = make_state(jax.random.key(0), only, {"tokenizer": optimizer})
    update = partial(apply_gradients, optimizer=optimizer, trainable=r"^tokenizer/decoder/")
    new = jax.jit(update, static_argnums=1)(state, "tokenizer", grads["tokenizer"])
    old, now = state.params["tokenizer"], new.params["tokenizer"]
    for part in ("foundation_encoder", "adapter"):
        jax.tree.map(np.testing.assert_array_equal, old[part], now[part])
    changed = jax.tree.map(lambda a, b: bool((a != b).all()), old["decoder"], now["decoder"])
    assert all(jax.tree.leaves(changed))


def test_phases_say_what_learns_and_what_counts(config):
    config.tokenizer.train.steps = 6
    config.tokenizer.phases = ((2, "adapter|decoder", ("l1",)), (4, "", ("l1", "align", "gan")))
    config.tokenizer.gan.update(start=5, discriminator_start=3)
    validate(config)
    phases = [tokenizer.phase_of(config.tokenizer, step) for step in range(6)]
    assert [phase.trainable for phase in phases] == ["adapter|decoder"] * 2 + [""] * 4
    assert phases[0].terms == ("l1",)
    assert [phase.discriminator for phase in phases] == [False] * 3 + [True] * 3
    assert [phase.gan for phase in phases] == [False] * 5 + [True]
    config.tokenizer.train.steps = 7
    with pytest.raises(ConfigError, match="have 6 steps in all"):
        validate(config)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("align.point", "middle", "use one of latent"),
        ("gan.loss", "wgan", "use one of hinge, vanilla"),
        ("losses.kl", 0.1, "bottleneck=.kl"),
        ("train.accumulate", 3, "does not divide into"),
        ("phases", ((6, "", ("l2",)),), "unknown terms"),
    ],
)
def test_clashes_of_the_tokenizer_are_explained(config, path, value, says):
    *sections, leaf = path.split(".")
    section = config.tokenizer[sections[0]] if sections else config.tokenizer
    section[leaf] = value
    with pytest.raises(ConfigError, match=says):
        validate(config)


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    full = rng.normal(size=(20_000, 6))
    np.testing.assert_allclose(health.effective_rank(jnp.asarray(full)), 6, rtol=1e-2)
    flat = full[:, :2] @ rng.normal(size=(2, 6))
    assert health.effective_rank(jnp.asarray(flat)) <= 2.001


def watch(accuracy, loss, steps=100, every=5):
    found = health.GanWatch(loss="hinge", window=50)
    said = []
    for step in range(0, steps, every):
        said += found(step, {"discriminator/accuracy": accuracy, "discriminator/loss": loss})
    return said


def test_a_discriminator_that_wins_loses_or_stalls_is_named_once_with_a_remedy():
    (won,) = watch(0.99, 0.1)
    assert "has won" in won
    assert "discriminator_optim.learning_rate" in won
    (lost,) = watch(0.37, 2.1)
    assert "loses" in lost
    (stalled,) = watch(0.5, 1.0)
    assert "has stalled" in stalled
    assert not watch(0.8, 0.6)
    assert not watch(0.99, 0.1, steps=30), "too early to tell"


def test_health_is_in_the_metrics_of_a_run(small_run):
    rows = read_metrics(small_run / "tokenizer")
    last = rows[-1]
    for name in (
        "discriminator/accuracy", "discriminator/logits_real", "last_layer/l1", "last_layer/gan",
        "latent/mean", "latent/std", "eval/latent_rank", "eval/probe", "eval/psnr",
    ):  # fmt: skip
        assert np.isfinite(last[name]), name
    steps = sorted(int(p.name) for p in (small_run / "tokenizer" / "checkpoints").iterdir())
    assert 4 in steps, "the last checkpoint before the GAN is kept"
