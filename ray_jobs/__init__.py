"""Jobs on Ray: prepare data, train, evaluate. The only place that knows Ray Data and Ray Train."""

import time

BEGUN = time.time()
"""When this process first needed this package: for a command, when it began."""
