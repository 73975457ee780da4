# Sourced by launch/train.sh and launch/train.sbatch, which set `here` to this folder and `program` to their name.

fail() {
    echo "$program: $1" >&2
    exit 2
}

# Sets `python` to HUNYUAN_PYTHON, else to the interpreter of the hunyuan-pretrain on PATH, else to .venv of this checkout.
find_interpreter() {
    local command
    if [[ -n ${HUNYUAN_PYTHON:-} ]]; then
        python=$HUNYUAN_PYTHON
    elif command=$(command -v hunyuan-pretrain); then
        # A console script need not have its python beside it (~/.local/bin); its first line names the interpreter.
        python=$(dirname "$command")/python
        [[ -x $python ]] || python=$(sed -n '1s/^#! *//p' "$command")
    else
        python=$here/../.venv/bin/python
    fi
    "$python" -c "" 2>/dev/null || fail "$python: no such interpreter; install the project (docs/guide/installation.md) or set HUNYUAN_PYTHON"
    local missing
    missing=$("$python" -c "
from importlib.util import find_spec
if not (find_spec('hunyuan_pretrain') and find_spec('launch')):
    raise SystemExit('the project')
from hunyuan_pretrain.config.extras import REQUIRED
raise SystemExit(', '.join(package for name, package in REQUIRED.items() if not find_spec(name)) or 0)" 2>&1) ||
        fail "$python lacks $missing; install the project there (docs/guide/installation.md) or set HUNYUAN_PYTHON"
}
