"""One measurement in a process of its own: the job comes as JSON, and so does the answer."""

import json
import sys

from mixtral_lab.bench.fresh import in_this_process

print(json.dumps(in_this_process(**json.loads(sys.argv[1]))))
