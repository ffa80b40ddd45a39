#!/bin/bash
set -euo pipefail
export MINITRON_PYTHON=/PYTHON
mkdir -p outputs/demo/slurm
job1=$(sbatch --parsable --job-name=demo-NUMBER --nodes=2 --ntasks-per-node=2 --time=01:00:00 --signal=USR1@60 --requeue --dependency=singleton --kill-on-invalid-dep=yes --open-mode=append --output=outputs/demo/slurm/%j.log --chdir=/CWD /ROOT/slurm/stage.sbatch experiment=demo cluster=small_lab parallel.tp=2 parallel.dp=2 'controls=[ce]')
echo $job1
