#!/bin/sh
# Makes the images of this directory and the journals and qcow2 images of its
# neighbours, which the tests and fuzz targets start from. They are small, and
# compressed because they are mostly zeros. Needs e2fsprogs, qemu-utils, root
# (the dirty journals are made by mounting), and a minute.
set -eu
cd "$(dirname "$0")"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
tree=$tmp/tree
mkdir -p "$tree/dir/sub" "$tree/many" "$tree/run/pyro-secrets"
echo hello >"$tree/dir/file"
seq 1 4000 >"$tree/dir/sub/large"
ln -s file "$tree/dir/fast"
ln -s "$(printf %0200d 7)" "$tree/dir/slow"
ln "$tree/dir/file" "$tree/hard"
echo token >"$tree/run/pyro-secrets/token"
truncate -s 300K "$tree/sparse"
echo end >>"$tree/sparse"
i=0
while [ $i -lt 60 ]; do : >"$tree/many/some-file-of-many-$i"; i=$((i + 1)); done
mkdir "$tree/pipes" && mkfifo "$tree/pipes/p"

image() { # NAME SIZE OPTIONS...
	name=$1 size=$2
	shift 2
	rm -f "$tmp/$name"
	mke2fs -q -F -b 1024 -U 00000000-0000-4000-8000-000000000001 -d "$tree" "$@" "$tmp/$name" "$size"
	e2fsck -fyD "$tmp/$name" >/dev/null || [ $? = 1 ]
	gzip -9nc "$tmp/$name" >"$name.gz"
}
image extents 256K -t ext4 -O ^has_journal,^metadata_csum -N 96
image csum 256K -t ext4 -O ^has_journal,metadata_csum,64bit -N 96
image blockmap 256K -t ext2 -N 96
image inline 256K -t ext4 -O ^has_journal,^metadata_csum,inline_data -N 96
image metabg 512K -t ext4 -O ^has_journal,^metadata_csum,^resize_inode,meta_bg -g 256 -N 128

dirty() { # NAME OPTIONS...
	name=$1
	shift
	mke2fs -q -F -b 1024 -t ext4 -U 00000000-0000-4000-8000-000000000001 -J size=1 -N 96 -d "$tree" "$@" "$tmp/$name" 4M
	mkdir "$tmp/mnt"
	mount -o loop,data=journal "$tmp/$name" "$tmp/mnt"
	mkdir "$tmp/mnt/new" "$tmp/mnt/gone"
	: >"$tmp/mnt/gone/x"
	sync -f "$tmp/mnt/new"
	rm -r "$tmp/mnt/gone"
	printf '\300\073\071\230 starts with the magic number' >"$tmp/mnt/new/magic"
	sync "$tmp/mnt/new/magic" "$tmp/mnt/new"
	cp "$tmp/$name" "$tmp/$name.crashed"
	umount "$tmp/mnt"
	rmdir "$tmp/mnt"
	gzip -9nc "$tmp/$name.crashed" >"$name.gz"
	debugfs -R "cat <8>" "$tmp/$name.crashed" 2>/dev/null | head -c 150K | gzip -9n >"../../jbd2/testdata/$name.gz"
}
dirty dirty -O ^metadata_csum,^64bit
dirty dirty-csum -O metadata_csum,64bit

qcow2() { # NAME OPTIONS...
	name=$1
	shift
	qemu-img convert -f raw -O qcow2 "$@" "$tmp/extents" "$tmp/$name"
	gzip -9nc "$tmp/$name" >"../../qcow2/testdata/$name.gz"
}
qcow2 plain -o cluster_size=512
qcow2 zlib -c -o cluster_size=4k
qcow2 zstd -c -o cluster_size=4k,compression_type=zstd
qcow2 v2 -o compat=0.10,cluster_size=1k
