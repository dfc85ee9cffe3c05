#!/bin/sh
# Process 1 of a sandbox node: makes its namespaces look like a host of their own, then runs slurmd.
# It stays as process 1 because something has to reap the orphans of the jobs. When slurmd ends, the node goes off.
# usage: node_init.sh DIRECTORY NAME ADDRESS/PREFIX
set -eu
directory=$1 name=$2 address=$3

hostname "$name"
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up

mount -t proc proc /proc
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm
mount --bind "$directory/etc/hosts" /etc/hosts
# Clients in jobs find the cluster without SLURM_CONF (sbatch --export=NONE), as on a real node.
if [ -d /etc/slurm ]; then mount --bind "$directory/etc" /etc/slurm; fi

# A new sysfs shows this network's interfaces, not the machine's; it hides the cgroups, which slurmd needs.
mkdir -p "$directory/cgroup/$name"
mount --rbind /sys/fs/cgroup "$directory/cgroup/$name"
mount -t sysfs sysfs /sys
mount --move "$directory/cgroup/$name" /sys/fs/cgroup

slurmd -D -N "$name" &
wait $!
