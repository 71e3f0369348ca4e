#!/bin/sh
# Install the wheel of linflab for this Python and processor into a new virtual environment:
#   install.sh DIRECTORY_OF_WHEELS ENVIRONMENT [OPTIONS_OF_PIP...]
set -eu
wheels=$1
environment=$2
shift 2

tag=$(python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
pattern="linflab-*-$tag-$tag-*linux*_$(uname -m).whl"
wheel=$(find "$wheels" -maxdepth 1 -name "$pattern" | sort | tail -n 1)
if [ -z "$wheel" ]; then
    echo "install.sh: $wheels has no $pattern; run \`make dist\` with this Python version, or use a released wheel" >&2
    exit 1
fi
python3 -m venv "$environment"
"$environment/bin/pip" install --no-cache-dir "$@" "$wheel[cluster,exchange]"
