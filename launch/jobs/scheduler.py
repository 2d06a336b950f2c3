"""MindSpore's scheduler, through which the ranks of a job connect; mpirun does not start it.

The environment makes it one (MS_ROLE=MS_SCHED); it then runs until the last rank has disconnected.
"""

from pipeline.runtime import start_communication

if __name__ == "__main__":
    start_communication()
