#!/bin/bash
# Runs the main job on real input. 64 MiB of this machine's shared libraries go into a backup, page by page and in bulk.
# The demo inspects them, drops a part, and restores the rest bit for bit. `show` prints each command and then evaluates
# it. The exit status is 0 only if everything held. Nothing is left behind.
set -euo pipefail
export LC_ALL=C
exec </dev/null
start=${EPOCHREALTIME/./}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bold='' dim='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; fi

say() { printf '\n%s# %s%s\n' "$dim" "$1" "$plain"; }

show() { # COMMAND: print it, then run it
    command=$1
    printf '%s$ %s%s\n' "$bold" "$1" "$plain"
    eval "$1"
}

refused() { # MESSAGE COMMAND: print and run a command that must fail with this message
    local status=0 output
    command=$2
    printf '%s$ %s%s\n' "$bold" "$2" "$plain"
    output=$(eval "$2" 2>&1) || status=$?
    printf '%s\n' "$output"
    [ "$status" -ne 0 ] || die "that should have failed"
    [[ $output == *"$1"* ]] || die "that should have failed with: $1"
}

die() {
    printf 'demo: %s\n' "$1" >&2
    exit 1
}

directory=$(realpath "$(mktemp -d -t ttmfs-demo.XXXXXX)")
command=
clean_up() {
    local status=$?
    trap - EXIT
    [ "$status" -eq 0 ] || printf 'demo: FAILED (exit status %d) at: %s\n' "$status" "${command:-the beginning}" >&2
    cd /
    if grep -qF " $directory/mnt fuse.ttmfs " /proc/self/mounts && ! fusermount3 -u -z "$directory/mnt"; then
        printf 'demo: %s is still mounted\n' "$directory/mnt" >&2
        exit 1
    fi
    rm -rf --one-file-system "$directory"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

say "A mount of at most 80 MiB. It is ready when the command returns."
show "cd $directory && mkdir mnt"
PATH=$repository/.venv/bin:$PATH
show 'ttmfs mount mnt -o size=80m'
show 'findmnt mnt'

say "Real input: 64 MiB of this machine's shared libraries."
show "find /usr/lib -type f -name '*.so*' -size +32k | sort > libraries; touch source"
show 'while [ $(stat -c %s source) -lt $((64 << 20)) ] && read -r file; do cat "$file" >> source; done < libraries'
found=$(stat -c %s source)
[ "$found" -ge $((64 << 20)) ] || die "there are only $found bytes of shared libraries under /usr/lib; 64 MiB are needed"
show 'truncate -s 64M source && sha256sum source'

say "A backup is a directory. Its pages are files, named by handle: 1, 2, 3 and so on."
show 'page=$(getconf PAGESIZE); pages=$(($(stat -c %s source) / page)); echo $pages pages of $page bytes'
show 'mkdir mnt/a'

say "The first 2 MiB go in page by page, one cat for each ..."
show "head -c 2M source | split -b \$page -a 5 --numeric-suffixes=1 --filter='cat > mnt/a/\$(expr \$FILE + 0)' - ''"
show 'ls -lv mnt/a | tail -n 3'
say "... and the rest in bulk, through .image, which holds page i at byte i * page_size."
show 'dd if=source of=mnt/a/.image bs=1M skip=2 seek=2 conv=notrunc'

say "Inspect it."
set +o pipefail # head ends before other programs do
show 'xxd mnt/a/1 | head -n 4'
show 'du -sh mnt/a'
show 'df -h mnt'
show 'ttmfs ls mnt'
show 'ttmfs map mnt/a | tail -n 3'
show 'ttmfs status mnt | head -n 5'
set -o pipefail
show '[ $(ls mnt/a | wc -l) -eq $pages ] && [ $(df --output=used -B $page mnt | tail -n 1) -eq $pages ]'

say "Compare everything, through .image and through .shmem, the memory itself."
show 'cmp -n $((64 << 20)) source mnt/a/.image'
show 'stat -c "%F, mode %a" mnt/a/.shmem'
show 'cmp -n $((64 << 20)) source mnt/a/.shmem'

say "Drop every third page. Their memory is free at once."
show "seq 3 3 \$pages | sed 's|^|mnt/a/|' | xargs rm"
show 'df -h mnt'
show 'left=$((pages - pages / 3)); echo $left pages should be left'
show '[ $(ls mnt/a | wc -l) -eq $left ] && [ $(df --output=used -B $page mnt | tail -n 1) -eq $left ]'
refused 'No such file or directory' 'cat mnt/a/3'

say "Restore the others, and compare them with the source without every third page."
show "xxd -p -c \$page source | sed '0~3d' | xxd -r -p | sha256sum | tee expected"
show "ls -v mnt/a | sed 's|^|mnt/a/|' | xargs cat | sha256sum | tee restored"
show 'cmp expected restored'

say "End the backup, and the mount."
refused 'not empty' 'rmdir mnt/a'
show 'ttmfs fini mnt/a'
show '[ $(df --output=used -B $page mnt | tail -n 1) -eq 0 ] && [ -z "$(ls -A mnt)" ]'
show 'ttmfs umount mnt && rmdir mnt'

# shellcheck disable=SC2154 # the commands shown above set pages and left
printf '\nheld: %d pages stored, %d dropped, %d restored bit for bit, every byte given back; %s s\n' \
    "$pages" $((pages - left)) "$left" "$(awk "BEGIN { printf \"%.1f\", (${EPOCHREALTIME/./} - $start) / 1e6 }")"
