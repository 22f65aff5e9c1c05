#!/bin/sh
# Write random secrets into a new file, which its owner alone can read: infra/env.sh FILE. One that is there stays as it is.
set -eu
[ $# -eq 1 ] || { echo "usage: infra/env.sh FILE" >&2; exit 2; }
[ ! -e "$1" ] || { echo "$1 is there already, and stays as it is."; exit 0; }

random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }

umask 077
new=$(mktemp "$1.XXXXXX")
trap 'rm -f "$new"' EXIT
{
    echo "# Secrets of infra/compose.yaml. Keep a copy: without S3_ENCRYPTION_KEY the images cannot be read."
    echo "POSTGRES_PASSWORD=$(random 24)"
    echo "S3_ACCESS_KEY=$(random 10)"
    echo "S3_SECRET_KEY=$(random 24)"
    echo "S3_ENCRYPTION_KEY=$(random 32)"
    echo "MLFLOW_PASSWORD=$(random 24)"
    echo "MLFLOW_SECRET_KEY=$(random 32)"
    echo "PREFECT_PASSWORD=$(random 24)"
    echo "GRAFANA_PASSWORD=$(random 24)"
} >"$new"
# A link, not a rename: of two that run at once, the second does not replace what the first has written.
ln "$new" "$1" 2>/dev/null || { echo "$1: cannot be written, or was made just now; expected a place for a new file." >&2; exit 2; }
echo "wrote random secrets into $1"
