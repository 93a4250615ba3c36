#!/usr/bin/env bash
# Hands on to Ray that the provider is about to take this spot machine away: trainings on it then make a checkpoint at once.
# notice.sh aws|gcp; aws.yaml and gcp.yaml start it on workers, in the background. $NOTICE_URL: another metadata server.
set -euo pipefail

case $1 in
aws) # notice comes two minutes before; until then there is no such page
    url=${NOTICE_URL:-http://169.254.169.254}/latest seconds=110
    noticed() {
        local token
        token=$(curl -sf -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$url/api/token") &&
            curl -sf -H "X-aws-ec2-metadata-token: $token" "$url/meta-data/spot/instance-action" > /dev/null
    }
    ;;
gcp) # notice comes half a minute before
    url=${NOTICE_URL:-http://metadata.google.internal}/computeMetadata/v1/instance/preempted seconds=25
    noticed() { [ "$(curl -sf -H "Metadata-Flavor: Google" "$url")" = TRUE ]; }
    ;;
esac

until noticed; do sleep 2; done
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the provider takes this machine away" \
    --deadline-remaining-seconds "$seconds"
