"""The configuration files of the lab's Slurm."""

from pathlib import Path

CONF = """\
ClusterName=minitron_lab
SlurmctldHost=head({net}.1)
SlurmctldPort=17817
SlurmdPort=17818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
KillWait={kill_wait_s}
SlurmdTimeout={slurmd_timeout_s}
InactiveLimit=0
MinJobAge=3600
SchedulerParameters=bf_interval=5,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{gres}
{cloud}
{nodes}
PartitionName=batch Nodes=ALL MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF State=UP
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF State=UP
PartitionName=spot Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} State=UP
"""
CLOUD = "PrivateData=cloud\nSuspendProgram=/bin/true\nResumeProgram=/bin/true\nSuspendTime=60"
# CgroupPlugin is named so that slurmd does not look for a cgroup hierarchy, which containers often lack.
CGROUP = "CgroupPlugin=cgroup/v1\n"


def write_conf(root: Path, *, net: str, names: list[str], cpus: int, gpus: int, grace_s: int, kill_wait_s: int = 10,
               slurmd_timeout_s: int = 20, powered_off: bool = False) -> None:
    """Write slurm.conf, gres.conf and cgroup.conf for `names` at addresses `net`.11 and up.

    Nodes that are `powered_off` need no slurmd: slurmctld believes what is claimed for them, as of a cloud's.
    """
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    state = "CLOUD" if powered_off else "UNKNOWN"
    nodes = "\n".join(f"NodeName={name} NodeAddr={net}.{11 + i} CPUs={cpus} RealMemory=64000{gres} State={state}"
                      for i, name in enumerate(names))
    (root / "slurm.conf").write_text(CONF.format(root=root, net=net, nodes=nodes, grace_s=grace_s,
                                                 kill_wait_s=kill_wait_s, slurmd_timeout_s=slurmd_timeout_s,
                                                 gres="GresTypes=gpu" if gpus else "",
                                                 cloud=CLOUD if powered_off else ""))
    files = f"File=/dev/null Count={gpus}" if gpus == 1 else f"Count={gpus}"
    (root / "gres.conf").write_text(f"Name=gpu {files}\n" if gpus else "")
    (root / "cgroup.conf").write_text(CGROUP)
