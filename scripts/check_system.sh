#!/bin/sh
# Checks what the build needs and pip cannot install. Usage: check_system.sh PYTHON
set -eu
python=${1:-python3}
fail() { printf 'error: %s\n' "$1" >&2; exit 2; }

command -v "$python" >/dev/null 2>&1 || fail "'$python' was not found: install Python 3.10 to 3.13, or name one with make PYTHON=..."
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
  || fail "$("$python" --version) is not supported: Python 3.10 to 3.13 is; name one with make PYTHON=..."
"$python" -c 'import ensurepip, venv' 2>/dev/null \
  || fail "'$python' cannot make virtual environments: install its venv module (Debian: apt-get install python3-venv)"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
  || fail "the headers of '$python' are missing: install them (Debian: apt-get install python3-dev)"
compiler=${CXX:-}
[ -n "$compiler" ] || for candidate in c++ g++ clang++; do
  command -v "$candidate" >/dev/null 2>&1 && { compiler=$candidate; break; }
done
{ [ -n "$compiler" ] && command -v "${compiler%% *}" >/dev/null 2>&1; } \
  || fail "no C++ compiler was found: install g++ (Debian: apt-get install g++), or name one with CXX=..."
