# Makes .venv from a requirements file, once; sourced by demo.sh and test.sh.
#
#   make_environment REQUIREMENTS
#
# Uses uv where it is installed, else Python's own venv and pip. PYTHON names the interpreter
# (default: the newest of python3.12, python3.11, python3 that is 3.11 or newer).

find_python() {
  local name
  for name in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; install it or set PYTHON=/path/to/python" >&2
  return 1
}

make_environment() {
  local requirements=$1 stamp python
  stamp=".venv/.installed-$(cat requirements.txt "$requirements" | cksum | tr ' ' '-')"
  if [ -e "$stamp" ]; then
    return
  fi
  python=$(find_python) || return 1
  echo "installing $requirements into .venv with $("$python" --version) ..."
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$(command -v "$python")" .venv || return 1
    uv pip install --quiet --python .venv/bin/python -r "$requirements" || return 1
  else
    [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" || return 1
  fi
  touch "$stamp"
}
