#!/bin/sh
# Prepares LIBERO in a Python environment:  scripts/libero.sh PYTHON      (e.g. .venv/bin/python)
# `make libero` calls it. INSTALL=0 leaves the environment's packages alone.
# LIBERO_ASSETS=/path/to/folder-or-archive takes meshes and textures from there instead of the hub.
# LIBERO_CONFIG_PATH=DIR is where LIBERO's config.yaml goes (default: libero-config beside bin/).
set -eu
python=$1
cd "$(dirname "$0")/.."

say() { printf '\n==> %s\n' "$*"; }
die() { printf '\nerror: %s\n' "$*" >&2; exit 1; }
pip_install() { "$python" -m pip install --disable-pip-version-check -q "$@"; }

# hf-libero asks for packages that it does not need to evaluate, among them another build of torch:
# it comes without its dependencies, after those it does import.
if [ "${INSTALL:-1}" != 0 ]; then
    say "installing LIBERO"
    pip_install -c constraints.txt -e '.[libero]'
    pip_install --no-deps hf-libero==0.1.4 bddl==1.0.1
fi
root=$("$python" -c 'from importlib.util import find_spec as f; print(f("libero").submodule_search_locations[0])' \
    2>/dev/null) || die "the package libero is not installed for $python; run without INSTALL=0"
root=$root/libero

# -- meshes and textures -------------------------------------------------------------------------
complete() {
    for part in articulated_objects scenes stable_hope_objects stable_scanned_objects textures \
        turbosquid_objects; do
        [ -d "$1/$part" ] || return 1
    done
}
take_assets() {
    [ -e "$LIBERO_ASSETS" ] || die "LIBERO_ASSETS=$LIBERO_ASSETS does not exist"
    say "taking the assets from $LIBERO_ASSETS"
    mkdir -p "$new"
    if [ -d "$LIBERO_ASSETS" ]; then cp -r "$LIBERO_ASSETS/." "$new"; else tar -xf "$LIBERO_ASSETS" -C "$new"; fi
    [ ! -d "$new/assets" ] || { mv "$new/assets" "$new.inner"; rm -rf "$new"; mv "$new.inner" "$new"; }
    echo "given as LIBERO_ASSETS" > "$new/ORIGIN"
}
fetch_assets() {
    say "downloading the assets from the Hugging Face hub (lerobot/libero-assets)"
    "$python" -c 'import sys; from huggingface_hub import snapshot_download as get
get("lerobot/libero-assets", repo_type="dataset", local_dir=sys.argv[1])' "$new" \
        || die "the download failed. Run again to go on, or, where there is no network, copy the
assets here and name the folder or archive: make libero LIBERO_ASSETS=/path/to/assets"
    echo "lerobot/libero-assets" > "$new/ORIGIN"
}
if complete "$root/assets"; then
    say "the assets are there: $(cat "$root/assets/ORIGIN" 2>/dev/null || echo 'of unknown origin')"
else
    new=$root/assets.part
    if [ -n "${LIBERO_ASSETS:-}" ]; then rm -rf "$new"; take_assets; else fetch_assets; fi
    complete "$new" || { rm -rf "$new"
        die "no LIBERO assets: folders such as scenes or textures are missing in ${LIBERO_ASSETS:-the download}"; }
    rm -rf "$root/assets"
    mv "$new" "$root/assets"
fi

# -- config.yaml, so that the first import asks nothing ------------------------------------------
: "${LIBERO_CONFIG_PATH:=$(dirname "$(dirname "$python")")/libero-config}"
mkdir -p "$LIBERO_CONFIG_PATH"
LIBERO_CONFIG_PATH=$(cd "$LIBERO_CONFIG_PATH" && pwd)
export LIBERO_CONFIG_PATH
cat > "$LIBERO_CONFIG_PATH/config.yaml" <<YAML
assets: $root/assets
bddl_files: $root/bddl_files
benchmark_root: $root
datasets: $root/../datasets
init_states: $root/init_files
YAML

say "drawing one scene"
MUJOCO_GL=${MUJOCO_GL:-egl} "$python" - <<'PYTHON'
import os

from libero.libero import benchmark, get_libero_path
from libero.libero.envs import OffScreenRenderEnv

task = benchmark.get_benchmark_dict()["libero_object"]().get_task(0)
file = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=64, camera_widths=64)
image = env.reset()["agentview_image"]
env.close()
assert image.std() > 1, "the picture is blank"
print(f"{task.language}: drawn")
PYTHON
say "LIBERO is ready. Before anything that uses it:
    export LIBERO_CONFIG_PATH=$LIBERO_CONFIG_PATH
Then go on with docs/serving.md"
