#!/usr/bin/env bash
# Prepares one machine of a `ray up` cluster: Python 3.11 and the pinned packages in ~/perceiver-env.
# With an argument, HOST:/PATH of an NFS share, it also mounts that at /mnt/perceiver (this alone needs sudo).
# Runs on every node as the ssh user. Where all is there already it only looks, in a second.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
env=$HOME/perceiver-env
uv=$HOME/.local/bin/uv

# rsync brings the token with the permissions it has on the launching machine.
chmod 700 "$HOME/.ray"
chmod 600 "$HOME/.ray/auth_token"

if ! cmp --silent "$here/requirements.txt" "$env/requirements.txt"; then
    if [ ! -x "$uv" ]; then
        curl -LsSf https://astral.sh/uv/0.13.9/install.sh | env UV_NO_MODIFY_PATH=1 sh
    fi
    "$uv" venv --quiet --allow-existing --python 3.11 "$env"
    "$uv" pip sync --quiet --python "$env/bin/python" "$here/requirements.txt"
    cp "$here/requirements.txt" "$env/requirements.txt"  # written last: its presence says that the rest is complete
fi

if [ $# -gt 0 ] && ! mountpoint --quiet /mnt/perceiver; then
    if ! command -v mount.nfs > /dev/null; then
        sudo apt-get update --quiet
        sudo apt-get install --yes --quiet nfs-common
    fi
    sudo mkdir -p /mnt/perceiver
    sudo mount -t nfs -o hard,timeo=600,retrans=2 "$1" /mnt/perceiver
    sudo chown "$(id -u):$(id -g)" /mnt/perceiver
fi

# Ray's launcher runs every command in an interactive login shell; so does `ray attach`.
line='export PATH="$HOME/perceiver-env/bin:$PATH" RAY_AUTH_MODE=token'
touch "$HOME/.bashrc"
grep --quiet --line-regexp --fixed-strings "$line" "$HOME/.bashrc" || echo "$line" >> "$HOME/.bashrc"
