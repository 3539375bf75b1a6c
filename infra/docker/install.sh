#!/bin/sh
# Installs what an image runs, into the Python that is on the PATH. Used by every build file here and by
# a test, so what is built is what was tried.
#
#   install.sh SOURCE REQUIREMENT...     e.g. install.sh /src 'train' 'torch==2.13.0'
#
# SOURCE is this repository. A plain word is one of its extras; anything else goes to pip as it is.
# Versions come from SOURCE/constraints.txt. Options for pip, as --dry-run, go into PIP_OPTIONS.
set -eu

source=${1:?usage: install.sh SOURCE REQUIREMENT...}
shift
extras=
count=$#
while [ "$count" -gt 0 ]; do
    case $1 in
        *[!a-z]*) set -- "$@" "$1" ;;
        *) extras=${extras:+$extras,}$1 ;;
    esac
    shift
    count=$((count - 1))
done
if [ -n "$extras" ]; then
    set -- "$source[$extras]" "$@"
fi
# One command, so that pip settles torch together with the rest: a later one would bring another build.
# shellcheck disable=SC2086 # options are words
python -m pip install --no-cache-dir --disable-pip-version-check --no-input \
    --constraint "$source/constraints.txt" ${PIP_OPTIONS:-} "$@"
