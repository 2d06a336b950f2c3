"""MindSpore's scheduler, through which the ranks of a job find one another; under mpirun it has to be started apart.

It is a process of MindSpore's own with MS_ROLE=MS_SCHED, that serves while `init` lasts and ends after the last rank.
"""


def serve() -> None:
    import pipeline  # noqa: F401  (first: it prepares the environment for MindSpore)

    # isort: split
    from mindspore.communication import init

    init()


if __name__ == "__main__":
    serve()
