"""A rank of a real job, started by msrun or mpirun, that only sums over the ranks at each step:
`python -m tests.helpers.sum_ranks STEPS FAULT...`

FAULT is `RANK:WHAT:STEP` as in `tests.helpers.fake_ranks`. Each rank writes sum_R.json in the
attempt's folder: the sum, its number of cores, and the time of the first step.
"""

import json
import os
import signal
import sys
import time

from pipeline.runtime import is_scheduler, start_communication
from tests.helpers.fake_ranks import FOLDER, beat, end, misbehave


def main(steps: int, faults: list[list[str]]) -> None:
    mine = start_communication()
    if is_scheduler():
        return
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    output = os.open(FOLDER / f"rank_{mine.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    beat(mine.rank, "starting", 0)
    import numpy as np
    from mindspore import Tensor, ops
    from mindspore.communication import GlobalComm

    all_reduce = ops.AllReduce(ops.ReduceOp.SUM, GlobalComm.WORLD_COMM_GROUP)
    try:
        for step in range(1, steps + 1):
            # As in the training loop, stop requests are summed too, so that all stop at one step.
            values = np.array([mine.rank + 1, bool(stopped)], np.float32)
            total, num_stop_requests = all_reduce(Tensor(values)).asnumpy().tolist()
            if step == 1:
                record = {
                    "sum": total,
                    "cores": len(os.sched_getaffinity(0)),
                    "time": time.time(),
                }
                (FOLDER / f"sum_{mine.rank}.json").write_text(json.dumps(record))
            beat(mine.rank, "training", step)
            for rank, what, when in faults:
                if (int(rank), int(when)) == (mine.rank, step):
                    misbehave(mine.rank, what, step)
            if num_stop_requests:
                end(mine.rank, 75)
            time.sleep(0.2)
    except Exception as error:
        end(mine.rank, 1, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    beat(mine.rank, "finished", steps)
    end(mine.rank, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), [fault.split(":") for fault in sys.argv[2:]])
