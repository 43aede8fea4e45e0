#!/usr/bin/env bash
# Runs a command over several hosts with Open MPI's mpirun, one process a GPU.
#   tools/cluster/mpirun.sh HOSTS COMMAND...
#   tools/cluster/mpirun.sh hosts.txt build/cuda/entrain train configs/dash-338m.yaml --resume
# HOSTS is a file with a host a line and its number of GPUs: "node1 slots=8". This machine must
# reach them by ssh without a password, and each must have the same packages and see the working
# folder under the same path (a shared file system).
#
# To stop: kill -USR1 the process of this script; the run finishes its step, saves and exits with 3.
# Where hosts have several networks, name the one to use before:
#   export NCCL_SOCKET_IFNAME=eth0 OMPI_MCA_btl_tcp_if_include=eth0
set -euo pipefail

die() { echo "tools/cluster/mpirun.sh: $*" >&2; exit 1; }

[[ $# -ge 2 ]] || { echo "usage: tools/cluster/mpirun.sh HOSTS COMMAND..." >&2; exit 2; }
hosts=$1
shift
[[ -f $hosts ]] || die "no file '$hosts'; it lists a host a line, as 'node1 slots=8'"
command -v mpirun >/dev/null || die "no mpirun; install Open MPI (tools/setup)"

# shellcheck source=tools/mpi-env
. "$(dirname "$0")/../mpi-env"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # ranks share a host's cores; GPUs do the work

forward=()  # mpirun itself takes along OMPI_*, nothing else
for name in PATH LD_LIBRARY_PATH $(compgen -e | grep -E '^(OMP|NCCL|UCX|CUDA)_'); do
  [[ -z ${!name-} ]] || forward+=(-x "$name")
done

# As many processes as there are slots, those of a host next to each other. exec: signals to this
# process are mpirun's.
exec mpirun --hostfile "$hosts" --map-by slot --wdir "$PWD" "${forward[@]}" "$@"
