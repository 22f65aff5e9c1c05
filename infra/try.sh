#!/usr/bin/env bash
# The team's stack for real, where no image can be pulled: infra/try.sh DIR [STEP ...]
#
# For a machine with Debian 12, root and no Docker of its own: an engine and docker-compose from Debian's packages, below
# DIR alone; images of our own from a small Debian; stand-ins for the others (infra/try/Dockerfile; without Grafana). Every
# service is on this machine's network, at addresses below 127.0.16 (infra/try/compose.yaml). It takes 14 GB and an hour.
#
# Steps, all by default: tools engine bases images up loop kills again end. `engine` may be said again: what runs, runs on.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: infra/try.sh DIR [STEP ...]" >&2; exit 2; }
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(dirname "$HERE")
mkdir -p "$1"
TRY_DIR=$(cd "$1" && pwd)
shift
cd "$ROOT"

TOOLS=$TRY_DIR/tools
export TRY_DIR TMPDIR=$TRY_DIR/tmp PATH=$TOOLS/usr/bin:$TOOLS/usr/sbin:$PATH DOCKER_HOST=unix://$TRY_DIR/docker.sock
export DOCKER_CONFIG=$TRY_DIR/docker DOCKER_BUILDKIT=1 NO_PROXY=localhost,127.0.0.0/8 no_proxy=localhost,127.0.0.0/8
export BASE=visionloop-base POSTGRES_IMAGE=try-postgres S3_IMAGE=try-s3 PROXY_IMAGE=try-proxy \
    PROMETHEUS_IMAGE=try-prometheus ALERTMANAGER_IMAGE=try-alertmanager
COMPOSE="$TOOLS/usr/libexec/docker/cli-plugins/docker-compose -f infra/compose.yaml -f infra/try/compose.yaml --env-file $TRY_DIR/env"
export COMPOSE
# Debian's packages come from where this machine has its own.
MIRROR=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 2>/dev/null | head -n 1 || true)
[ -n "$MIRROR" ] || { echo "infra: no source of Debian 12 (bookworm) in /etc/apt; expected one. Run this on Debian 12, or add it." >&2; exit 2; }
mkdir -p "$TMPDIR"

say() { echo "$(date +%T)  $*"; }

tools() { # programs that run from where they are unpacked
    local apt=$TRY_DIR/apt
    mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$TOOLS"
    printf 'deb %s bookworm main\ndeb %s trixie main\n' "$MIRROR" "$MIRROR" >"$apt/sources.list"
    local options=(-qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$apt/lists"
        -o "Dir::Cache=$apt" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update
    (cd "$apt/archives" && apt-get "${options[@]}" download docker.io/bookworm containerd/bookworm runc/bookworm tini/bookworm \
        mmdebstrap/bookworm docker-compose/trixie)
    for package in "$apt"/archives/*.deb; do dpkg -x "$package" "$TOOLS"; done
    say "$(dockerd --version), compose $($COMPOSE version --short)"
}

engine() {
    docker version >/dev/null 2>&1 && return
    mkdir -p "$TRY_DIR/data" "$TRY_DIR/exec"
    setsid dockerd --data-root "$TRY_DIR/data" --exec-root "$TRY_DIR/exec" --pidfile "$TRY_DIR/dockerd.pid" -H "$DOCKER_HOST" \
        --bridge=none --iptables=false --ip-forward=false >"$TRY_DIR/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq 600); do docker version >/dev/null 2>&1 && return; sleep 1; done
    tail -n 5 "$TRY_DIR/dockerd.log" >&2
    return 1
}

strap() { # NAME PACKAGE,... : an archive of Debian with these, without what only people read
    [ ! -s "$TRY_DIR/try/$1.tar" ] || return 0
    mmdebstrap --quiet --mode=root --variant=essential --include="$2" --aptopt='APT::Sandbox::User "root"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --essential-hook='mkdir -p "$1/etc/postgresql-common" && echo create_main_cluster=false >"$1/etc/postgresql-common/createcluster.conf"' \
        bookworm "$TRY_DIR/try/new.tar" "$MIRROR"
    mv "$TRY_DIR/try/new.tar" "$TRY_DIR/try/$1.tar"
}

bases() {
    mkdir -p "$TRY_DIR/try"
    cp infra/try/postgres.sh infra/try/Dockerfile "$TRY_DIR/try/"
    ln -f .venv/bin/weed "$TRY_DIR/try/weed" 2>/dev/null || cp .venv/bin/weed "$TRY_DIR/try/weed"
    strap base python3-venv,ca-certificates,libstdc++6
    strap programs postgresql-15,nginx-light,prometheus,prometheus-alertmanager,wget
    docker build -q -t visionloop-base --target base "$TRY_DIR/try"
    for name in postgres s3 proxy prometheus alertmanager; do
        docker build -q -t "try-$name" --target "$name" --network host "$TRY_DIR/try"
    done
}

images() {
    [ -f "$TRY_DIR/pip.conf" ] || cp /etc/pip.conf "$TRY_DIR/pip.conf" 2>/dev/null || : >"$TRY_DIR/pip.conf"
    [ -f "$TRY_DIR/env" ] || infra/env.sh "$TRY_DIR/env"
    for service in setup server-1 mlflow; do $COMPOSE build --quiet "$service"; done
    docker image ls --format '{{.Repository}} {{.Size}}' | sort
}

up() {
    # nginx of Debian 12 does not look up names again: they are asked for once, and stay.
    sed -e 's/listen 8080/listen 127.0.16.15:8080/' -e '/resolver /d' -e 's/ resolve / /' infra/nginx.conf >"$TRY_DIR/nginx.conf"
    BUILD=--no-build infra/up.sh $COMPOSE
    $COMPOSE ps --format '{{.Service}} {{.Status}}'
    $COMPOSE logs --no-log-prefix setup
}

loop() { python3 infra/try/outside.py "$TRY_DIR" loop; }
kills() { python3 infra/try/outside.py "$TRY_DIR" kills; }
again() { python3 infra/try/outside.py "$TRY_DIR" again; }

end() { # all of it goes, but what was downloaded
    $COMPOSE down --volumes --timeout 20
    kill "$(cat "$TRY_DIR/dockerd.pid")"
    while [ -e "$TRY_DIR/dockerd.pid" ]; do sleep 1; done
    umount "$TRY_DIR/exec/netns/default" 2>/dev/null || true # dockerd leaves it
    rm -rf "$TRY_DIR/data" "$TRY_DIR/exec" "$TRY_DIR/env" "$TRY_DIR/said.json"
}

tell() { # what a step that failed leaves
    [ "$1" = 0 ] || say "NOT  $name failed ($1). What runs, runs on: \`infra/try.sh $TRY_DIR engine $name ...\` goes on, \`... end\` takes it down."
}
trap 'tell $?' EXIT

for step in "${@:-tools engine bases images up loop kills again end}"; do
    for name in $step; do say "== $name"; "$name"; done
done
