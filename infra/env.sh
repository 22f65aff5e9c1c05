#!/bin/sh
# Write random secrets into a new file, which its owner alone can read: infra/env.sh FILE. One that is there stays as it is.
set -eu
[ $# -eq 1 ] || { echo "usage: infra/env.sh FILE" >&2; exit 2; }
SECRETS="POSTGRES_PASSWORD:24 S3_ACCESS_KEY:10 S3_SECRET_KEY:24 S3_ENCRYPTION_KEY:32 MLFLOW_PASSWORD:24 MLFLOW_SECRET_KEY:32
    PREFECT_PASSWORD:24 GRAFANA_PASSWORD:24" # each with its bytes

if [ -e "$1" ]; then
    missing=""
    for secret in $SECRETS; do
        grep -q "^${secret%:*}=." "$1" || missing="$missing ${secret%:*}"
    done
    [ -z "$missing" ] || {
        echo "$1: has no$missing; expected all secrets of the stack. Put back your copy; for a new stack remove the file, and run this again." >&2
        exit 2
    }
    echo "$1 is there already, and stays as it is."
    exit 0
fi

refuse() { echo "$1: cannot be written, or was made just now; expected a place for a new file. Look at its folder and its disk." >&2; exit 2; }
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }

umask 077
new=$(mktemp "$1.XXXXXX" 2>/dev/null) || refuse "$1"
trap 'rm -f "$new"' EXIT
text="# Secrets of infra/compose.yaml. Keep a copy: without S3_ENCRYPTION_KEY the images cannot be read."
for secret in $SECRETS; do
    text="$text
${secret%:*}=$(random "${secret#*:}")"
done
(printf '%s\n' "$text" >"$new") 2>/dev/null || refuse "$1"
# A link, not a rename: of two that run at once, the second does not replace what the first has written.
ln "$new" "$1" 2>/dev/null || refuse "$1"
echo "wrote random secrets into $1"
