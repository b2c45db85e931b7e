# shellcheck shell=bash
# Makes .venv from a requirements file, once; sourced by the other scripts.
#
#   make_environment REQUIREMENTS [cpu|cuda12|cuda13|tpu]
#
# Uses uv where it is installed, else Python's own venv and pip. PYTHON names the interpreter
# (default: the newest of python3.12, python3.11, python3 that is 3.11 or newer; uv fetches
# Python 3.12 where there is none).

find_python() {
  local name
  for name in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  # the images of TPU VMs have Python 3.10
  if command -v uv >/dev/null && uv python install --quiet 3.12 >&2; then
    uv python find 3.12
    return
  fi
  echo "error: Python 3.11 or newer is needed; install it or set PYTHON=/path/to/python" >&2
  return 1
}

make_environment() {
  local requirements=$1 accelerator=${2:-cpu} stamp python
  # One resolution: the build for the accelerator gets the version that requirements.txt pins.
  local packages=(-r "$requirements")
  stamp=".venv/.installed-$(cat requirements.txt "$requirements" | cksum | tr ' ' '-')"
  if [ "$accelerator" != cpu ]; then
    packages+=("jax[$accelerator]")
    stamp="$stamp-$accelerator"
  fi
  if [ -e "$stamp" ]; then
    return
  fi
  if [[ "$accelerator" = cuda* ]] && compgen -G ".venv/.installed-*-cuda*" | grep -qv -- "-$accelerator\$"; then
    echo "error: .venv has JAX for another CUDA than $accelerator, and both do not work beside" \
      "each other; remove .venv and run this again" >&2
    return 1
  fi
  python=$(find_python) || return 1
  echo "installing ${packages[*]} into .venv with $("$python" --version) ..."
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$(command -v "$python")" .venv || return 1
    uv pip install --quiet --python .venv/bin/python "${packages[@]}" || return 1
  else
    [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${packages[@]}" || return 1
  fi
  touch "$stamp"
}
