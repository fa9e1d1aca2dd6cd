#!/usr/bin/env bash
# `make chat` and `make test` on a machine that has nothing: a Debian in a folder of its own (debootstrap), with make, git
# and python3-venv, with and without a compiler. Takes root, a network, up to 15 GB of disk, and up to an hour for each.
#
#   tests/scripts/fresh_machine.sh trixie                 # Debian 13, Python 3.13, without a compiler
#   tests/scripts/fresh_machine.sh trixie g++             # with one
#   TESTS=yes tests/scripts/fresh_machine.sh forky g++    # Debian testing, Python 3.14; make test, too
#
# It says the time, the bytes received and the disk used. pip's configuration files and variables of this machine are
# taken along, with the files that they name. The mounts are in a namespace of their own, so that nothing of this machine
# is in reach when the folder is removed: at the end, also after Ctrl-C. KEEP=FOLDER keeps it there.
set -euo pipefail

received() { awk -F'[: ]+' 'NR > 2 && $2 != "lo" { sum += $3 } END { printf "%.0f", sum }' /proc/net/dev; }

within() { # a command in the root's checkout, and what it cost
	local began=$SECONDS bytes disk status=0 pip
	bytes=$(received)
	disk=$(du -sxm "$root" | cut -f1)
	mapfile -t pip < <(env | grep '^PIP_' || true)
	echo "== $*"
	chroot "$root" env -i HOME="$HOME" PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 "${pip[@]}" \
		sh -c "cd /root/normistral && $*" || status=$?
	echo "== exit code $status, $((SECONDS - began)) s, $((($(received) - bytes) / 1000000)) MB received," \
		"$(($(du -sxm "$root" | cut -f1) - disk)) MB more on disk"
	return "$status"
}

copy_in() { # files of this machine, to the same places
	while read -r file; do
		mkdir -p "$root$(dirname "$file")"
		cp "$file" "$root$file"
	done
}

if [ "${1:-}" != --inside ]; then
	release=${1:?which Debian: trixie or forky}
	shift
	root=$(mktemp -d -t fresh-machine-XXXXXX)
	trap 'if [ -n "${KEEP:-}" ]; then mv "$root" "$KEEP"; else rm -rf --one-file-system "$root"; fi' EXIT
	trap 'exit 130' INT TERM
	echo "== $release with ${*:-no compiler}"
	packages=$(printf ",%s" ca-certificates make git python3 python3-venv "$@")
	debootstrap --variant=minbase --include="${packages#,}" "$release" "$root" >"$root.log" || { cat "$root.log"; exit 1; }
	rm "$root.log"
	unshare --mount --pid --fork --kill-child "$0" --inside "$root"
	exit
fi

root=$2
source=$(cd "$(dirname "$0")/../.." && pwd)
mount --bind "$root" "$root" # a mount point, as / is anywhere: tests make namespaces of their own
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t sysfs sys "$root/sys"
copy_in <<</etc/resolv.conf
python3 -m pip config debug 2>/dev/null | sed -n 's/^ *\(\/.*\), exists: True$/\1/p' | copy_in || true
python3 -m pip config list 2>/dev/null | tr "'= " '\n\n\n' | sed -n '/^\//p' | sort -u |
	while read -r path; do if [ -f "$path" ]; then echo "$path"; fi; done | copy_in || true

git -c safe.directory='*' clone --quiet "$source" "$root/root/normistral"
chroot "$root" sh -c 'python3 --version; command -v c++ || echo "no compiler"'
within 'make chat PROMPT="What is the capital of Norway?" >/tmp/answer && cat /tmp/answer && grep -q Oslo /tmp/answer'
within '.venv/bin/normistral doctor | grep "int4 and int8 on OpenVINO"'
within 'make chat PROMPT="What is the capital of Norway?"'
if [ -n "${TESTS:-}" ]; then within 'make test'; fi
