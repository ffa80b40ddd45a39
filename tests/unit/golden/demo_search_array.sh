#!/bin/bash
set -euo pipefail
export MINITRON_PYTHON=/PYTHON
mkdir -p outputs/demo_search/slurm
job1=$(sbatch --parsable --job-name=demo-NUMBER --nodes=1 --ntasks-per-node=2 --time=01:00:00 --signal=USR1@60 --requeue --dependency=singleton --kill-on-invalid-dep=yes --open-mode=append --output=outputs/demo_search/slurm/%j.log --chdir=/CWD /ROOT/slurm/stage.sbatch experiment=demo_search cluster=small_lab cluster.search_array=4 search.rungs=2 parallel.tp=2 'only=[score]')
job2=$(sbatch --parsable --job-name=demo-NUMBER-rung1 --nodes=1 --ntasks-per-node=2 --time=01:00:00 --signal=USR1@60 --requeue --array=0-8%4 "--dependency=afterok:$job1" --kill-on-invalid-dep=yes --open-mode=append --output=outputs/demo_search/slurm/%A_%a.log --chdir=/CWD /ROOT/slurm/stage.sbatch candidate rung=1 experiment=demo_search cluster=small_lab cluster.search_array=4 search.rungs=2 parallel.tp=2)
job3=$(sbatch --parsable --job-name=demo-NUMBER-rung2 --nodes=1 --ntasks-per-node=2 --time=01:00:00 --signal=USR1@60 --requeue --array=0-4%4 "--dependency=afterok:$job2" --kill-on-invalid-dep=yes --open-mode=append --output=outputs/demo_search/slurm/%A_%a.log --chdir=/CWD /ROOT/slurm/stage.sbatch candidate rung=2 experiment=demo_search cluster=small_lab cluster.search_array=4 search.rungs=2 parallel.tp=2)
job4=$(sbatch --parsable --job-name=demo-NUMBER --nodes=1 --ntasks-per-node=2 --time=01:00:00 --signal=USR1@60 --requeue "--dependency=afterok:$job3,singleton" --kill-on-invalid-dep=yes --open-mode=append --output=outputs/demo_search/slurm/%j.log --chdir=/CWD /ROOT/slurm/stage.sbatch experiment=demo_search cluster=small_lab cluster.search_array=4 search.rungs=2 parallel.tp=2 'only=[search,prune,distill,compare,evaluate,report]')
echo $job1 $job2 $job3 $job4
