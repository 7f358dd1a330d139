#!/bin/bash
# One node as a machine of its own: process and mount namespaces, in which containerd and the kubelet run. Whoever ends
# this program takes the machine's power: every pod, shim and mount goes with it. Only FOLDER is left, as a disk would be.
#
#     unshare --mount --pid --fork --kill-child machine.sh FOLDER KUBE NAME
set -euo pipefail
folder=$1 kube=$2 name=$3

mount --make-rprivate /
mount -t proc proc /proc
mount --make-rshared /  # the kubelet mounts what containers then see

# What programs keep in fixed places: /run is lost with the power, /var is the machine's disk.
mount -t tmpfs tmpfs /run
mkdir -p "$folder"/{kubelet,log,cni,containerd} /run/netns
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /var/log
mkdir -p /var/lib/kubelet /var/lib/cni /var/log/pods
mount --bind "$folder/kubelet" /var/lib/kubelet

containerd --config "$folder/containerd.toml" >>"$folder/log/containerd.log" 2>&1 &
for _ in $(seq 100); do
  ctr --address "$folder/containerd.sock" version >/dev/null 2>&1 && break
  sleep 0.1
done
for archive in "$folder"/images/*.tar; do
  [ -e "$archive" ] || continue
  ctr --address "$folder/containerd.sock" --namespace k8s.io images import "$archive" >>"$folder/log/images.log" 2>&1
  rm "$archive"
done

exec "$kube" kubelet --config="$folder/kubelet.json" --kubeconfig="$folder/kubelet.kubeconfig" \
  --hostname-override="$name" --node-ip="$4" --root-dir=/var/lib/kubelet >>"$folder/log/kubelet.log" 2>&1
