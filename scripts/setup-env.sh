#!/bin/sh
# Set up an environment:  scripts/setup-env.sh FOLDER CONSTRAINTS EXTRA
#
# The Makefile calls this script. It needs sh and Python 3.11 to 3.14, or sh and uv. Variables:
#   PYTHON       the Python to use; by default the first supported one on PATH
#   TORCH_INDEX  a package index that serves torch, where the usual one serves a build that is too large
#
# FOLDER/.installed marks a complete environment. FOLDER/.torch-index holds the TORCH_INDEX it was made with.
set -u

folder=$1
constraints=$2
extra=$3
stamp=$folder/.installed
log=$folder/.install.log
attempts=3
pause=10

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' > /dev/null 2>&1
}

version_of() {
    "$1" -c 'import sys; print(sys.version.split()[0])' 2> /dev/null
}

fail() {
    echo "$1" >&2
    exit 1
}

# True if packages can be added to the folder as it is. pip and uv keep an installed torch of the same version, so that
# another TORCH_INDEX needs a new folder.
can_be_reused() {
    is_supported "$folder/bin/python" && "$folder/bin/python" -c 'import pip' 2> /dev/null || return 1
    [ "$torch_index" = "$(cat "$folder/.torch-index" 2> /dev/null)" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$folder/bin/python")" ]
}

is_up_to_date() {
    [ -f "$stamp" ] && [ -z "$(find pyproject.toml "$constraints" -newer "$stamp")" ] && can_be_reused
}

# Sets $python, which is empty if only uv can provide one.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" > /dev/null || fail "There is no $PYTHON here: install Python 3.11 to 3.14, or say make PYTHON=..."
        is_supported "$PYTHON" || fail "$PYTHON is Python $(version_of "$PYTHON"), but 3.11 to 3.14 is needed: say make PYTHON=..."
    fi
    for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.14 python3.11 python; do
        if is_supported "$python"; then
            # The Python behind an active environment, which may be the folder that make_folder removes.
            python=$("$python" -c 'import sys; print(sys._base_executable)')
            return
        fi
    done
    python=
    [ -n "$uv" ] || fail "There is no Python 3.11 to 3.14 here: install one, or uv, or say make PYTHON=..."
}

# Python's own venv brings pip without a download. Debian and Ubuntu leave a part of it out of python3; uv needs no part.
make_folder() {
    rm -rf "$folder"
    if [ -n "$uv" ] && { [ -z "$python" ] || ! "$python" -c 'import ensurepip' 2> /dev/null; }; then
        "$uv" venv --quiet --seed --python "${python:->=3.11,<3.15}" "$folder"
    else
        "$python" -m venv "$folder" || fail "$folder could not be made; the reason is above."
    fi
}

# uv does not read pip's settings. This function hands over those that decide which packages are installed.
hand_pip_settings_to_uv() {
    settings=$("$folder/bin/python" -m pip config list 2> /dev/null)
    for pair in index-url=UV_DEFAULT_INDEX extra-index-url=UV_INDEX find-links=UV_FIND_LINKS constraint=UV_CONSTRAINT; do
        variable=${pair#*=}
        # pip prints a line break in a value as \n.
        value=$(printf '%s\n' "$settings" | sed -n -E "s/^(:env:|global|install)\.${pair%%=*}='(.*)'\$/\2/p" | head -n 1)
        value=$(printf '%s\n' "$value" | sed 's/\\n/ /g; s/^ *//')
        [ "$variable" != UV_FIND_LINKS ] || value=$(printf '%s\n' "$value" | tr -s ' ' ',')
        eval "[ -n \"\${$variable:-}\" ]" || [ -z "$value" ] || export "$variable=$value"
    done
    # pip takes the best version that any of the indexes has.
    [ -z "${UV_INDEX:-}" ] || export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
}

with_uv() {
    "$uv" pip install --quiet --python "$folder/bin/python" --constraint "$constraints" "$@"
}

with_pip() {
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --constraint "$constraints" "$@"
}

# $1 is with_uv or with_pip. An index for torch may lack the pinned versions of torch's dependencies: --no-deps.
install_packages() {
    { [ -z "$torch_index" ] || "$1" --no-deps --index-url "$torch_index" torch; } && "$1" --editable ".[$extra]"
}

# Shows what the installer prints and keeps it in the log.
install_with() {
    status=$({ { install_packages "$1"; echo $? >&3; } 2>&1 | tee "$log" >&2; } 3>&1)
    [ "$status" = 0 ]
}

# Another attempt helps only against a download that failed.
is_worth_another_attempt() {
    ! grep -q -E 'No space left|Disk quota exceeded|ResolutionImpossible|conflicting dependencies' "$log"
}

install() {
    if [ -n "$uv" ]; then
        install_with with_uv && return
        echo "uv could not install the packages; pip tries next." >&2
    fi
    attempt=1
    until install_with with_pip; do
        { [ "$attempt" -lt "$attempts" ] && is_worth_another_attempt; } || return 1
        attempt=$((attempt + 1))
        echo "The installation failed. Attempt $attempt of $attempts starts in $pause seconds." >&2
        sleep "$pause"
    done
}

fail_to_install() {
    echo "$folder could not be set up; the reason is above." >&2
    echo "Behind a proxy: set HTTPS_PROXY; set PIP_CERT to its certificate, or PIP_INDEX_URL to its package index." >&2
    fail "Offline: run \"pip wheel -w wheels -c $constraints '.[$extra]' hatchling editables\" on a like machine, copy the folder wheels here, then say PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make env."
}

say_how_to_have_a_smaller_torch() {
    for package in "$folder"/lib/python3*/site-packages/nvidia_*.dist-info; do
        [ -e "$package" ] || return 0
        echo "torch came as a CUDA build of several GB, which works with and without a GPU; for a smaller CPU build say make env TORCH_INDEX=ADDRESS (README: Set-up)."
        return 0
    done
}

# A call without TORCH_INDEX keeps the one that the folder was made with.
torch_index=${TORCH_INDEX:-$(cat "$folder/.torch-index" 2> /dev/null)}
if is_up_to_date; then exit 0; fi

uv=$(command -v uv)
# uv has no variable for pip's no-index.
case ${PIP_NO_INDEX:-0} in 0 | false) ;; *) uv= ;; esac
find_python
echo "Setting up $folder with $(basename "${uv:-pip}"): about 1 GB (several GB where torch comes as a CUDA build), some minutes, once."
can_be_reused || make_folder || fail_to_install
echo "$torch_index" > "$folder/.torch-index"
rm -f "$stamp"
[ -z "$uv" ] || hand_pip_settings_to_uv
install || fail_to_install
rm -f "$log"
touch "$stamp"
[ -n "$torch_index" ] || say_how_to_have_a_smaller_torch
