#!/usr/bin/env bash
# nbdev's hooks for notebooks: git merges them cell by cell and trusts what was pulled, Jupyter cleans them when it saves.
# Called by setup.sh. They change this clone only: nbdev writes Jupyter's hook into the home folder, so it gets another one,
# and the hook goes where Jupyter of this environment looks. Needs no network; a copy without .git, or a worktree, is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .git ] && command -v git >/dev/null || exit 0
jupyter=$(python -c 'import sys; print(sys.prefix)')/etc/jupyter/jupyter_server_config.py
post_merge=.git/hooks/post-merge
[ -f "$jupyter" ] && [ -f $post_merge ] && git config --local --get-all include.path 2>/dev/null | grep -qxF ../.gitconfig && exit 0
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
[ ! -f $post_merge ] || cp -p $post_merge "$home/post-merge"
GIT_CONFIG_GLOBAL=${GIT_CONFIG_GLOBAL:-$HOME/.gitconfig} HOME=$home nbdev_install_hooks >/dev/null
if [ -f "$home/post-merge" ]; then cp -p "$home/post-merge" $post_merge # somebody's own; `nbdev_trust` is theirs to add
else # a pull without the environment activated must not complain
    printf '#!/bin/sh\nPATH=$PWD/.venv/bin:$PATH\n! command -v nbdev_trust >/dev/null || nbdev_trust\n' > $post_merge
fi
mkdir -p "$(dirname "$jupyter")"
[ -f "$jupyter" ] || cp "$home/.jupyter/jupyter_server_config.py" "$jupyter"
