#!/bin/bash
set -euo pipefail
export MINITRON_PYTHON=/PYTHON
mkdir -p /lustre/out/llama-4b/slurm
job1=$(sbatch --parsable --job-name=llama-4b-d62fec --nodes=32 --ntasks-per-node=8 --account=llm --partition=batch --time=04:00:00 --cpus-per-task=14 --gpus-per-node=8 --signal=USR1@300 --requeue --dependency=singleton --kill-on-invalid-dep=yes --open-mode=append --output=/lustre/out/llama-4b/slurm/%j.log --chdir=/CWD --exclusive --mem=0 /ROOT/slurm/stage.sbatch teacher.path=/lustre/models/Llama-3.1-8B data.path=/lustre/data/web name=llama-4b output_dir=/lustre/out prune.target.hidden_size=3072 prune.target.ffn_hidden_size=9216 train.global_batch_size=1152 train.micro_batch_size=1 train.precision=bf16-mixed parallel=dgx_h100 parallel.dp=32 cluster=dgx_h100_superpod cluster.account=llm cluster.nodes=32)
echo $job1
