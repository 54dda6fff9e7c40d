#!/usr/bin/env bash
# Install the project into an environment that must not change: what is there stays, version by version; what is missing
# is added by name. Ends with an error, and says what, if that cannot be.
#
#   docker/install.sh PROJECT [PYTHON]
set -euo pipefail

project=$1
python=${2:-python}
# Not `pip`: in the NGC NeMo containers that one belongs to another interpreter than `python`.
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# name==version of everything that is installed, whatever it was installed from.
pip list --format=freeze | grep --invert-match '^nemo[-_]popsd==' | sort >"$work/before"

# pip refuses a file of constraints for a single version that is none by its rules; such a package is only compared below.
version='==([0-9]+!)?[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?(\+[A-Za-z0-9.]+)?$'
grep --extended-regexp -e "$version" "$work/before" >"$work/constraints"

pip install --no-deps "$project"

# From elsewhere than the project's directory, so that the answer is that of what was installed.
cd "$work"
"$python" -m nemo_popsd doctor --missing >missing
if [[ -s missing ]]; then
  echo "missing here, to be added:"
  cat missing
  # Megatron-Bridge asks for packages without builds; what it imports is in the container that ships it.
  grep '^megatron-bridge' missing >without_dependencies || true
  grep --invert-match '^megatron-bridge' missing >with_dependencies || true
  [[ ! -s with_dependencies ]] || pip install --constraint constraints --requirement with_dependencies
  [[ ! -s without_dependencies ]] || pip install --constraint constraints --no-deps --requirement without_dependencies
fi

pip list --format=freeze | sort >after
changed=$(comm -23 before after)
if [[ -n $changed ]]; then
  echo "error: the installation has changed or removed: $changed" >&2
  exit 1
fi
echo "added: $(comm -13 before after | tr '\n' ' ')"
