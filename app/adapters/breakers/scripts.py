"""The Lua that judges in Redis: each script is one step of one breaker, and atomic.

For `redis.py` only. A script touches the one key that it is given, so that it runs in a cluster; it
takes the time from Redis, never from a caller; and it never leaves a key without a TTL. Only what
Redis 6.2 and 7 both know is used: no functions, no EXPIRE NX.

A breaker is a hash. `status`, `generation`, `failures`, `opened_at`, `cooldown` say how it stands;
`probe`, `probe_at`, `probe_until` say who tries the target; `t:<generation>:<rank>:<kind>` is a
transition that nobody has made durable yet, with its cool-down and its holder. Times are ms.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from app.adapters.breakers.policy import PROBE_LOOK_MAX_S, PROBE_LOOK_S
from app.ports import TransitionKind

TRANSITIONS_MAX = 32
"""Transitions that a scope keeps for the sweeper; older ones make room for newer ones."""

RANKS = {TransitionKind.TRIPPED: 1, TransitionKind.HALF_OPEN: 2, TransitionKind.CLOSED: 3}
"""In the order in which they happen within a generation, so that names sort by age."""


@dataclass(frozen=True, slots=True)
class Script:
    """A script as text, and the name under which Redis has it once it ran."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


# A key that somebody filled with another type is thrown away: it is ours by its name, and its state
# is lost already. A value that can not be ours counts as 0. A clock that was set back ends waits
# instead of making them longer.
_BREAKER = """
local key = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local row = redis.pcall('HMGET', key, 'status', 'generation', 'failures', 'opened_at', 'cooldown',
                        'probe', 'probe_at', 'probe_until')
if row.err then
  redis.call('DEL', key)
  row = {}
end
local function number(value)
  local found = tonumber(value or 0) or 0
  return found >= 0 and found < 2^53 and math.floor(found) or 0
end
local function text(value) return string.format('%.0f', value) end
local status = row[1]
if status ~= 'open' and status ~= 'half_open' then status = 'closed' end
local generation = number(row[2])
local failures = number(row[3])
local opened_at = number(row[4])
local cooldown = number(row[5])
local probe = row[6] or ''
local probe_at = number(row[7])
local probe_until = number(row[8])

local wait = 0
if status == 'open' and now >= opened_at then
  wait = math.max(0, opened_at + cooldown - now)
elseif status == 'half_open' and probe ~= '' and now >= probe_at and now < probe_until then
  wait = math.min(math.max(LOOK_MS, now - probe_at), LOOK_MAX_MS, probe_until - now)
end
""".replace("LOOK_MS", str(round(PROBE_LOOK_S * 1000))).replace(
    "LOOK_MAX_MS", str(round(PROBE_LOOK_MAX_S * 1000))
)

_CHANGE = """
local ranks = {RANKS}
local function keep(ttl) redis.call('PEXPIRE', key, ttl) end
local function record(kind, holder)
  local name = 't:' .. text(generation) .. ':' .. ranks[kind] .. ':' .. kind
  redis.call('HSET', key, name, text(cooldown) .. ':' .. holder)
  local names = {}
  for _, found in ipairs(redis.call('HKEYS', key)) do
    if string.sub(found, 1, 2) == 't:' then table.insert(names, found) end
  end
  table.sort(names)
  for i = 1, #names - TRANSITIONS_MAX do redis.call('HDEL', key, names[i]) end
  return {kind, text(generation), text(cooldown)}
end
local function drop_probe() redis.call('HDEL', key, 'probe', 'probe_at', 'probe_until') end
local function close(holder, ttl)
  redis.call('HSET', key, 'status', 'closed', 'failures', 0)
  drop_probe()
  local told = record('closed', holder)
  keep(ttl)
  return told
end
""".replace("RANKS", ", ".join(f"{kind} = {rank}" for kind, rank in RANKS.items())).replace(
    "TRANSITIONS_MAX", str(TRANSITIONS_MAX)
)

ALLOW = Script(
    _BREAKER
    + _CHANGE
    + """
local holder, token, probe_ms, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
if status == 'closed' then return {'permit', text(generation)} end
if wait > 0 then return {'refused', text(generation), text(wait)} end
redis.call('HSET', key, 'status', 'half_open', 'probe', token,
           'probe_at', text(now), 'probe_until', text(now + probe_ms))
local told = {}
if status == 'open' then told = record('half_open', holder) end
keep(ttl)
return {'probe', text(generation), told}
"""
)
"""`holder, token, probe_ms, ttl`. A probe that takes the place of a lost one is no transition."""

REPORT = Script(
    _BREAKER
    + _CHANGE
    + """
local ok, holder = ARGV[3] == '1', ARGV[4]
local threshold, cooldown_ms, newest, ttl =
  tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
if generation ~= tonumber(ARGV[1]) then return {} end
if ARGV[2] ~= '' then
  if status ~= 'half_open' or probe ~= ARGV[2] then return {} end
elseif status ~= 'closed' then
  return {}
end
if ok then
  if status == 'half_open' then return close(holder, ttl) end
  if failures > 0 then
    redis.call('HSET', key, 'failures', 0)
    keep(ttl)
  end
  return {}
end
failures = failures + 1
redis.call('HSET', key, 'failures', text(failures))
if status == 'closed' and failures < threshold then
  keep(ttl)
  return {}
end
generation = math.max(generation + 1, now, newest + 1)
cooldown = cooldown_ms
redis.call('HSET', key, 'status', 'open', 'generation', text(generation),
           'opened_at', text(now), 'cooldown', text(cooldown))
drop_probe()
local told = record('tripped', holder)
keep(ttl)
return told
"""
)
"""`generation, probe, ok, holder, threshold, cooldown_ms, newest, ttl`.

`newest` is the highest generation that the caller saw: after a FLUSHALL within one ms the clock
alone would give it out again.
"""

RELEASE = Script(
    _BREAKER
    + """
if probe ~= '' and probe == ARGV[1] then
  redis.call('HDEL', key, 'probe', 'probe_at', 'probe_until')
  redis.call('PEXPIRE', key, ARGV[2])
end
return {}
"""
)
"""`token, ttl`. The probe is free again, if it still is this one."""

RESET = Script(
    _BREAKER
    + _CHANGE
    + """
if status ~= 'closed' then return close('', ARGV[1]) end
if failures > 0 then
  redis.call('HSET', key, 'failures', 0)
  keep(ARGV[1])
end
return {}
"""
)
"""`ttl`."""

READ = Script(
    _BREAKER
    + """
local told = {}
local all = redis.call('HGETALL', key)
for i = 1, #all, 2 do
  if string.sub(all[i], 1, 2) == 't:' then
    table.insert(told, all[i])
    table.insert(told, all[i + 1])
  end
end
return {status, text(generation), text(failures), text(opened_at), text(wait), told}
"""
)
"""How the breaker stands, and the names and values of its transitions."""

FORGET = Script(_BREAKER + "redis.call('HDEL', key, unpack(ARGV)) return {}")
"""The names of transitions."""

_INDEX = """
local key = KEYS[1]
local kind = redis.call('TYPE', key).ok
if kind ~= 'zset' and kind ~= 'none' then redis.call('DEL', key) end
"""

LIST = Script(
    _INDEX
    + """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZADD', key, 'GT', now + ARGV[2] / 1000, ARGV[1])
redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
redis.call('ZREMRANGEBYRANK', key, 0, -(ARGV[3] + 1))
if redis.call('PTTL', key) < tonumber(ARGV[2]) then redis.call('PEXPIRE', key, ARGV[2]) end
return {}
"""
)
"""`scope, ttl, scopes_max`. The scope is in use, and listed until its TTL is over.

Scores are those ends, and none comes sooner: callers with short calls list with a short TTL.
"""

SCOPES = Script(_INDEX + "return redis.call('ZRANGE', key, 0, -1)")
"""Every scope that was in use within its TTL."""

CHECK = Script("redis.call('SET', KEYS[1], '1', 'PX', 10000) return {}")
"""Whether Redis takes writes; a PING is answered by a read-only replica, too."""
