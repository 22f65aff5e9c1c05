#!/usr/bin/env bash
# Start the team's stack, or say in one line why not: infra/up.sh COMPOSE ... (as the Makefile calls docker compose).
#
# It looks before anything is started: secrets, the engine, free ports and disk, images for this processor. If a part does
# not come up, it says what that part says last, and what was not running before is taken down again. BUILD=--no-build: the
# images are there.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: infra/up.sh COMPOSE ..." >&2; exit 2; }
FREE_MB=2000

refuse() { echo "infra: $1" >&2; exit 2; }

tell_why() { # of what a program says, the line that tells why: a full disk, an exception, its last error, or its last line
    local said
    said=$(grep -v '^ *$' || true)
    last() { grep "$@" <<<"$said" | tail -n 1 | grep .; }
    last -i 'no space left' || last -E '^[[:alnum:]_.]+(Error|Exception): ' || last -iE 'panic|fatal|error|denied|expected' || tail -n 1 <<<"$said"
}

config=$("$@" config) || exit 2 # it names the secret that is missing, or the line that is wrong
machine=$(docker version --format '{{.Server.Os}}/{{.Server.Arch}}' 2>/dev/null) ||
    refuse "no Docker engine answers; expected one that you may use. Start it, or set DOCKER_HOST."
running=$("$@" ps --quiet --status running)

if [ -z "$running" ]; then
    while read -r host port; do
        ! (exec 3<>"/dev/tcp/${host/0.0.0.0/127.0.0.1}/$port") 2>/dev/null ||
            refuse "port $port of $host is taken; expected a free one. Set PORT, MLFLOW_PORT, PREFECT_PORT or GRAFANA_PORT in infra/.env."
    done < <(awk '$1 == "host_ip:" {host = $2} $1 == "published:" {gsub(/"/, ""); print host, $2}' <<<"$config")
fi

disk=$(docker info --format '{{.DockerRootDir}}')
if [ -d "$disk" ]; then
    free=$(($(df -Pk "$disk" | awk 'NR == 2 {print $4}') / 1024))
    [ "$free" -ge "$FREE_MB" ] || refuse "$free MB are free on $disk; expected $FREE_MB. Make room: \`docker system prune\` shows how."
fi

for image in $("$@" config --images | sort -u); do
    made=$(docker image inspect --format '{{.Os}}/{{.Architecture}}' "$image" 2>/dev/null) || continue
    [ "$made" = "$machine" ] || docker run --rm --network none --entrypoint /bin/sh "$image" -c true >/dev/null 2>&1 ||
        refuse "image $image is for $made; expected one that runs on $machine. Build it here, or name another."
done

"$@" up --detach "${BUILD:---build}" && exit
for container in $("$@" ps --all --quiet); do
    read -r name exit_code restarts health < <(docker inspect --format \
        '{{index .Config.Labels "com.docker.compose.service"}} {{.State.ExitCode}} {{.RestartCount}} {{if .State.Health}}{{.State.Health.Status}}{{end}}' "$container")
    # A server has nothing to serve before the first champion, and nobody waits for it. What was started anew runs just now.
    [[ $name != server-* ]] && { [ "$health" = unhealthy ] || [ "$exit_code$restarts" != 00 ]; } || continue
    said=$(docker logs --tail 200 "$container" 2>&1 | tell_why)
    [[ ${said,,} != *"no space left"* ]] || said+="; expected room on $disk. Make some: \`docker system prune\` shows how."
    checked=$(docker inspect --format '{{if .State.Health}}{{range .State.Health.Log}}{{.Output}}{{end}}{{end}}' "$container")
    echo "infra: $name: $said${checked:+ ($(tell_why <<<"$checked"))}" >&2
done
[ -n "$running" ] || { "$@" down >/dev/null 2>&1; echo "infra: nothing was started. Correct that, and try again." >&2; }
exit 1
