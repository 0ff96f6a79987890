#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Writes, as Rust, the build id of each image given as NAME=FILE, where NAME is
# a module's name or "vmlinux" and FILE may be compressed.
set -eu

if [ $# -eq 0 ]; then
	echo "build-ids.sh: KVM_IMAGES is empty: call the project's Makefile, which finds KVM's modules" >&2
	exit 1
fi

tmp=$(mktemp)
trap 'rm -f "$tmp"' EXIT

echo "/// The images that hold KVM's structures, and their GNU build ids."
echo "pub(super) const BUILD_IDS: &[(&core::ffi::CStr, &[u8])] = &["
for image in "$@"; do
	name=${image%%=*}
	file=${image#*=}
	case $file in
	*.xz)	xz -dc "$file" >"$tmp" ;;
	*.zst)	zstd -qdc "$file" >"$tmp" ;;
	*.gz)	gzip -dc "$file" >"$tmp" ;;
	*)	cat "$file" >"$tmp" ;;
	esac
	id=$(readelf -n "$tmp" | sed -n 's/.*Build ID: *\([0-9a-f]*\).*/\1/p')
	if [ -z "$id" ]; then
		echo "build-ids.sh: $file has no GNU build id" >&2
		exit 1
	fi
	printf '    (c"%s", &[%s]),\n' "$name" \
		"$(printf '%s' "$id" | sed 's/../0x&, /g; s/, $//')"
done
echo "];"
