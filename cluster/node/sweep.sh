#!/usr/bin/env bash
# Ends what is left of Ray on this worker when its raylet has ended: that ends by itself a minute after the head has gone
# (`ray down`, or lost, or cut off from here), its helpers would stay. onprem.yaml starts it after `ray start`, in the background.
set -euo pipefail

tail --pid="$(pgrep -n -x -u "$(id -u)" raylet)" -f /dev/null
ray stop
