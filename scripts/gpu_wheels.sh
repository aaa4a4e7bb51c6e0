#!/usr/bin/env bash
# Gathers what scripts/gpu_check.py and the tests need on a machine without network that has Python 3.12, torch,
# torchvision, Triton, timm, accelerate, scikit-learn, matplotlib and tensorboard:
#     scripts/gpu_wheels.sh FOLDER [PACKAGE …]
# and there:
#     python3 -m pip install --no-index --no-deps --find-links FOLDER --requirement FOLDER/requirements.txt
# Further packages that the machine lacks are named after the folder; they come without what they depend on. Versions
# are those of the environment that this runs in, which is where the tests pass.
set -euo pipefail
folder=${1:?usage: scripts/gpu_wheels.sh FOLDER [PACKAGE …]}
shift
pip=(python3 -m pip --disable-pip-version-check)
mkdir -p "$folder"
rm -f "$folder"/*.whl
"${pip[@]}" list --format=freeze --exclude-editable >"$folder/constraints.txt"

# omegaconf takes this version, of which there is no wheel; the one built here is for any Python 3.
"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$folder" antlr4-python3-runtime==4.9.3

fetch() {
    "${pip[@]}" download --quiet --dest "$folder" --find-links "$folder" --constraint "$folder/constraints.txt" \
        --only-binary=:all: --implementation cp --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$@"
}
# With what they depend on, which is small; then without, for that would be torch.
fetch pydantic omegaconf jaxtyping beartype shtab rich pytest threadpoolctl filelock
fetch --no-deps kornia kornia-rs lightly lightly-utils "$@"

for wheel in "$folder"/*.whl; do
    IFS=- read -r name version _ <<<"$(basename "$wheel")"
    echo "$name==$version"
done >"$folder/requirements.txt"
bytes=$(cat "$folder"/*.whl | wc -c)
echo "$(wc -l <"$folder/requirements.txt") wheels, $((bytes / 1000000)) MB: $folder"
((bytes < 40000000)) || [ $# -gt 0 ] || { echo "more than 40 MB" >&2; exit 1; }
