-- The token that all processes share, the lock of who fetches it, and what Entra refused.
--
-- KEYS[1]  hash: blob (perhaps encrypted), serial, starts, ends, renew (ms); gone with the token
-- KEYS[2]  hash: code, detail, since, until (ms), failures (fetches refused in a row),
--                rejections (fresh tokens that Graph refused in a row)
-- KEYS[3]  string: who fetches, with an expiry
-- KEYS[4]  string: the name of KEYS[2] of whoever was refused last, while nobody has a token
--
-- Times are Redis's own, in milliseconds. Serials are Redis's time in microseconds, which no
-- later token repeats. ARGV[1] is the verb; each may be replayed without harm:
--   look    fetcher lock_ms unusable   -> {now, new_serial, mine, blob, serial, ends, renew,
--                                          until, code, detail}
--             takes the lock if a token is to be fetched and nobody does; a token with the
--             serial `unusable` counts as absent
--   keep    fetcher blob serial starts ends renew    -> 1, or 0 if the lock is another's
--   refuse  fetcher code detail wait_ms most_ms      -> the wait (ms): doubled with each failure
--   reject  serial code fresh_ms wait_ms most_ms     -> 1, or 0 if it is not this token any more
redis.replicate_commands()

local token, trouble, lock, last = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local verb = ARGV[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local FORGET_MS = 7200000  -- troubles older than this do not count as "in a row"

local function number(key, field)
  return tonumber(redis.call('HGET', key, field) or '0') or 0
end

local function rest(counter, code, detail, wait_ms, most_ms)
  local wait = math.min(most_ms, wait_ms * 2 ^ math.min(counter - 1, 20))
  redis.call('HSETNX', trouble, 'since', now)
  redis.call('HSET', trouble, 'code', code, 'detail', detail, 'until', now + wait)
  redis.call('PEXPIRE', trouble, FORGET_MS)
  redis.call('SET', last, trouble, 'PX', FORGET_MS)
  return wait
end

if verb == 'look' then
  local fetcher, lock_ms, unusable = ARGV[2], ARGV[3], ARGV[4]
  local serial = redis.call('HGET', token, 'serial') or ''
  local usable = serial ~= '' and serial ~= unusable and number(token, 'ends') > now
  local due = not usable or number(token, 'renew') <= now
  local mine = 0
  if due and number(trouble, 'until') <= now then
    redis.call('SET', lock, fetcher, 'NX', 'PX', lock_ms)
    if redis.call('GET', lock) == fetcher then mine = 1 end
  end
  local function text(key, field) return redis.call('HGET', key, field) or '' end
  return {
    now, clock[1] .. string.format('%06d', clock[2]), mine,
    usable and text(token, 'blob') or '', serial, number(token, 'ends'), number(token, 'renew'),
    number(trouble, 'until'), text(trouble, 'code'), text(trouble, 'detail'),
  }

elseif verb == 'keep' then
  if redis.call('GET', lock) ~= ARGV[2] then return 0 end
  redis.call('HSET', token, 'blob', ARGV[3], 'serial', ARGV[4], 'starts', ARGV[5],
             'ends', ARGV[6], 'renew', ARGV[7])
  redis.call('PEXPIREAT', token, ARGV[6])
  redis.call('HDEL', trouble, 'code', 'detail', 'until', 'failures')
  -- A token is no proof while Graph refuses one after another.
  if number(trouble, 'rejections') < 2 then redis.call('HDEL', trouble, 'since') end
  redis.call('DEL', lock, last)
  return 1

elseif verb == 'refuse' then
  local code, detail, wait_ms, most_ms = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
  if redis.call('GET', lock) ~= ARGV[2] then return wait_ms end
  redis.call('DEL', lock)
  local failures = redis.call('HINCRBY', trouble, 'failures', 1)
  return rest(failures, code, detail, wait_ms, most_ms)

elseif verb == 'reject' then
  local code, fresh_ms = ARGV[3], tonumber(ARGV[4])
  if redis.call('HGET', token, 'serial') ~= ARGV[2] then return 0 end
  local age = now - number(token, 'starts')
  redis.call('DEL', token)
  if age >= fresh_ms then redis.call('HDEL', trouble, 'rejections', 'since') end
  local rejections = redis.call('HINCRBY', trouble, 'rejections', 1)
  redis.call('PEXPIRE', trouble, FORGET_MS)
  if rejections > 1 then
    rest(rejections - 1, code, 'Graph refused a fresh token', tonumber(ARGV[5]), tonumber(ARGV[6]))
  end
  return 1
end

return redis.error_reply('tokens.lua: unknown verb ' .. tostring(verb))
