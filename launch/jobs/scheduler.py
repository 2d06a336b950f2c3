"""MindSpore's scheduler, through which the ranks of a job find one another; under mpirun it has to
be started apart.

By environment it is MS_ROLE=MS_SCHED; then meeting the others lasts until the last of them has
left.
"""

from pipeline.runtime import start_communication

if __name__ == "__main__":
    start_communication()
