# shellcheck shell=bash
# Common to the scripts that fetch packages of Debian's backports and unpack them, without
# installing anything; sourced after lib.sh, never run.
#
# They use apt with sources, package lists and state of its own below $LSD_CACHE/apt; the
# machine's apt set-up is read for its mirror, never changed.

apt=$lsd_cache/apt

# begin_fetch: one fetch at a time; the second finds what the first one brought.
begin_fetch() {
	local tool
	for tool in apt-get dpkg-deb; do
		have "$tool" || die "$tool not found: this needs a Debian machine"
	done
	[ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 packages are known here"
	mkdir -p "$apt"
	exec 9>"$apt/.lock"
	flock -w 600 9 || die "another fetch holds $apt/.lock for 10 minutes: try again"
}

# mirrors: the base address of each archive in the machine's own sources that
# carries a Debian release's main component; both of apt's formats.
mirrors() {
	local f
	for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
		[ -r "$f" ] || continue
		sed -nE 's/^[[:space:]]*deb([[:space:]]+\[[^]]*\])?[[:space:]]+([^[:space:]]+)[[:space:]]+([^[:space:]]+)[[:space:]]+(.*[[:space:]])?main([[:space:]].*)?$/\2 \3/p' "$f"
	done
	for f in /etc/apt/sources.list.d/*.sources; do
		[ -r "$f" ] || continue
		# One stanza a paragraph; values may continue on indented lines.
		awk '
			function flush(   i, j, nu, ns, u, s) {
				if (types ~ /(^| )deb( |$)/ && comps ~ /(^| )main( |$)/ && tolower(enabled) !~ /no/) {
					nu = split(uris, u, " "); ns = split(suites, s, " ")
					for (i = 1; i <= nu; i++) for (j = 1; j <= ns; j++) print u[i], s[j]
				}
				types = uris = suites = comps = enabled = key = ""
			}
			/^[[:space:]]*#/ { next }
			/^[[:space:]]*$/ { flush(); next }
			/^[^[:space:]]/ { key = tolower($0); sub(/:.*/, "", key); val = $0; sub(/^[^:]*:[[:space:]]*/, "", val) }
			/^[[:space:]]/ { val = $0; sub(/^[[:space:]]+/, "", val) }
			{
				if (key == "types") types = types " " val
				else if (key == "uris") uris = uris " " val
				else if (key == "suites") suites = suites " " val
				else if (key == "components") comps = comps " " val
				else if (key == "enabled") enabled = enabled val
			}
			END { flush() }
		' "$f"
	done
}

# The machine's apt.conf.d (proxy, credentials) still applies; its sources,
# preferences and state do not.
opts=(
	-o "Dir::Etc::sourcelist=$apt/sources.list" -o "Dir::Etc::sourceparts=$apt/empty"
	-o "Dir::Etc::preferences=$apt/empty/none" -o "Dir::Etc::preferencesparts=$apt/empty"
	-o "Dir::State=$apt" -o "Dir::State::lists=$apt/lists" -o "Dir::State::status=$apt/status"
	-o "Dir::State::extended_states=$apt/extended_states"
	-o "Dir::Cache=$apt" -o "Dir::Cache::archives=$apt/archives"
	-o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache="
	-o "Dir::Log=$apt" -o "Acquire::Languages=none" -o "Acquire::Retries=3"
	-o "APT::Sandbox::User=root" -o "Debug::NoLocking=1" -o "APT::Get::List-Cleanup=1"
)

# read_backports: reads the package lists of Debian 12's and 13's backports, unless that was done
# within the hour.
read_backports() {
	local mirror keyring suite
	[ -z "$(find "$apt/read" -mmin -60 2>/dev/null)" ] || return 0
	# The security archive has no backports; releases are known by name or by class.
	mirror=$(mirrors | awk '$2 ~ /^(bookworm|trixie|forky|stable|oldstable|testing|sid)(-updates)?$/ && $1 !~ /security/ { print $1; exit }')
	[ -n "$mirror" ] || die "found no Debian archive in /etc/apt/sources.list or /etc/apt/sources.list.d"

	keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	[ -r "$keyring" ] || die "$keyring is missing: apt-get install debian-archive-keyring"

	mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/empty"
	for suite in bookworm-backports trixie-backports; do
		echo "deb [arch=amd64 signed-by=$keyring] $mirror $suite main"
	done >"$apt/sources.list"
	: >"$apt/status"
	say "reading the package lists of Debian 12 and 13 backports"
	timeout 300 apt-get "${opts[@]}" -qq update >"$apt/update.log" 2>&1 ||
		die "apt-get update failed: $(grep -m1 '^[EW]:' "$apt/update.log" || tail -n1 "$apt/update.log")"
	if grep -q '^[EW]:' "$apt/update.log"; then
		# A warning here is a suite that could not be read or verified.
		say "apt says: $(grep -m1 '^[EW]:' "$apt/update.log")"
	else
		touch "$apt/read"
	fi
}

# fetch_packages DIR PACKAGE...: fetches packages and unpacks them to DIR.
fetch_packages() {
	local dir=$1 deb
	shift
	(cd "$dir" && timeout 600 apt-get "${opts[@]}" -qq download "$@") >"$apt/download.log" 2>&1 ||
		die "download failed: $(grep -m1 '^[EW]:' "$apt/download.log" || tail -n1 "$apt/download.log")"
	for deb in "$dir"/*.deb; do
		dpkg-deb -x "$deb" "$dir" || die "cannot unpack $(basename "$deb")"
		rm -f "$deb"
	done
}
