"""A Dask cluster of SLURM jobs for mammo_nb: prints the address for `-p scheduler=…` and keeps the cluster until Ctrl+C.

    pip install -e '.[cluster]'
    python cluster/slurm.py --jobs 8 --workers 32 --memory 96GB --walltime 12:00:00 --partition cpu
    mammo run infer -p cohort=york -p dicom_dir=/shared/york -p bundle=… -p scheduler=tcp://10.0.0.5:8786      # in a second terminal

Run it on a login or head node that the compute nodes can reach. Every node must see the DICOM files, the outputs folder and this environment under the same paths,
which a shared file system gives. --dry-run prints the job script and submits nothing.

Dask asks nobody who they are: whoever reaches the scheduler's port can run code as you. Name a private network with --interface, or switch on TLS by naming a
certificate authority, certificates and keys in Dask's configuration (distributed.comm.tls, https://distributed.dask.org/en/stable/tls.html), which this script, its
workers and mammo all read."""
import argparse
import time

import dask
from dask_jobqueue import SLURMCluster
from distributed import Security


def arguments():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--jobs', type=int, default=1, help='SLURM jobs to ask for')
    a.add_argument('--workers', type=int, default=16, help='worker processes per job, one core and one thread each')
    a.add_argument('--memory', default='48GB', help='memory per job; 3 GB per worker is plenty for mammograms')
    a.add_argument('--walltime', default='08:00:00', help='how long a job may run')
    a.add_argument('--partition', help='where to queue')
    a.add_argument('--account', help='who pays')
    a.add_argument('--interface', help='network interface of the private network, such as ib0')
    a.add_argument('--local-directory', default='/tmp', help='scratch of the node')
    a.add_argument('--before', action='append', default=[], metavar='LINE', help='a line of shell before the workers start, such as "module load python"; may be repeated')
    a.add_argument('--directive', action='append', default=[], metavar='TEXT', help='a further #SBATCH directive, such as "--constraint=avx2"; may be repeated')
    a.add_argument('--dry-run', action='store_true', help='print the job script and stop')
    return a.parse_args()


def cluster(a):
    tls = Security() if dask.config.get('distributed.comm.tls.ca-file', None) else None
    return SLURMCluster(cores=a.workers, processes=a.workers, job_cpu=a.workers, memory=a.memory, walltime=a.walltime, queue=a.partition, account=a.account, interface=a.interface,
                        local_directory=a.local_directory, job_extra_directives=a.directive, job_script_prologue=['export OMP_NUM_THREADS=1', *a.before], security=tls,
                        scheduler_options=dict(dashboard=False, dashboard_address=':0'))


def main():
    a = arguments()
    with cluster(a) as c:
        if a.dry_run: return print(c.job_script())
        c.scale(jobs=a.jobs)
        print(f'scheduler={c.scheduler_address}\n{a.jobs} jobs of {a.workers} workers are in the queue (squeue --me). Ctrl+C ends them.', flush=True)
        seen = -1
        try:
            while True:
                if (n := len(c.scheduler_info['workers'])) != seen: print(f'{n} of {a.jobs * a.workers} workers are there', flush=True)
                seen = n
                time.sleep(5)
        except KeyboardInterrupt: print('Ending the jobs.')


if __name__ == '__main__': main()
