#!/usr/bin/env bash
# Install the project and its missing packages into an environment whose installed versions must not change. If a version
# changed, the script fails and names the packages.
#
#   docker/install.sh PROJECT [PYTHON]
set -euo pipefail

project=$1
python=${2:-python}
nemo_core=$(dirname "$(realpath "$0")")/nemo-core.txt
# Not `pip`, which in the NGC NeMo containers belongs to a different interpreter than `python`.
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# name==version of every installed package, from any source.
pip list --format=freeze | grep --invert-match '^nemo[-_]popsd==' | sort >"$work/before"

# pip refuses a constraints file with a version that it cannot parse; such packages are only compared below.
version='==([0-9]+!)?[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?(\+[A-Za-z0-9.]+)?$'
grep --extended-regexp -e "$version" "$work/before" >"$work/constraints"

pip install --no-deps "$project"

# Outside of the project's directory, so that the installed package is imported.
cd "$work"
"$python" -m nemo_popsd doctor --missing >missing
if [[ -s missing ]]; then
  echo "missing packages to add:"
  cat missing
  # Megatron-Bridge requires packages without builds; the container that ships it has the modules that it imports.
  # NeMo's extra requires older versions than the containers without NeMo may have.
  grep --extended-regexp '^(megatron-bridge|nemo_toolkit)' missing >without_dependencies || true
  grep --extended-regexp --invert-match '^(megatron-bridge|nemo_toolkit)' missing >with_dependencies || true
  if grep --quiet '^nemo_toolkit' missing; then
    cat "$nemo_core" >>with_dependencies
  fi
  [[ ! -s with_dependencies ]] || pip install --constraint constraints --requirement with_dependencies
  [[ ! -s without_dependencies ]] || pip install --constraint constraints --no-deps --requirement without_dependencies
fi

pip list --format=freeze | sort >after
changed=$(comm -23 before after)
if [[ -n $changed ]]; then
  echo "error: the installation changed or removed: $changed" >&2
  exit 1
fi
echo "added: $(comm -13 before after | tr '\n' ' ')"
