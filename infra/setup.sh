#!/bin/sh
# Make the team's workspace, if there is none, and what the bucket should have. Can be run again.
set -eu
if [ ! -f params.yaml ]; then
    visionloop new . --example "$EXAMPLE"
    # /metrics on a port of its own, which the proxy does not pass on.
    sed -i 's/^serve:$/serve:\n  admin_port: 9100/' params.yaml
fi
visionloop store init
