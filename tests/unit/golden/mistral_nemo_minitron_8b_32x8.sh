#!/bin/bash
set -euo pipefail
export MINITRON_PYTHON=/PYTHON
mkdir -p /lustre/out/mistral_nemo_minitron_8b/slurm
job1=$(sbatch --parsable --job-name=mistral_nemo_minitron_8b-00ead6 --nodes=32 --ntasks-per-node=8 --account=llm --partition=batch --time=04:00:00 --cpus-per-task=14 --gpus-per-node=8 --signal=USR1@300 --requeue --dependency=singleton --kill-on-invalid-dep=yes --open-mode=append --output=/lustre/out/mistral_nemo_minitron_8b/slurm/%j.log --chdir=/CWD --exclusive --mem=0 /ROOT/slurm/stage.sbatch experiment=mistral_nemo_minitron_8b teacher.path=/lustre/models/teacher data.path=/lustre/data/web output_dir=/lustre/out cluster=dgx_h100_superpod cluster.account=llm cluster.nodes=32)
echo $job1
