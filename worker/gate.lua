-- The gate of one mailbox: its lane's lease, its slots, its cooldown. One call, all or nothing.
--
-- KEYS[1]  postroom:{mailbox}:gate    hash
--            lane    token of the lane that works this mailbox; lease  until when (ms)
--            cool    until when the mailbox rests (ms)
--            trouble how often in a row its sends went wrong
--            rung    how often the lane was rung; bell  when a task was last asked for (ms)
-- KEYS[2]  postroom:{mailbox}:slots   hash: slot id -> "expiry(ms) lane token"
--
-- Times are Redis's own, in milliseconds. ARGV[1] is the verb:
--   ask    token lease_ms slots #given_back id... #wanted id...
--            -> {"granted"|"held"|"cooling"|"full", count, wait_ms, rung, trouble}
--   leave  token rung            -> 1 gone, 0 rung meanwhile (stay), -1 not yours
--   ring   bell_ms               -> 1 send a task, 0 one is under way or a lane is at work,
--                                   or the milliseconds of cooldown left, negative
--   cool   ms trouble            -> until when (ms); `trouble`, as it was told, counts one more
--   calm                         -> 1 if there was trouble, now forgotten
redis.replicate_commands()

local gate, slots = KEYS[1], KEYS[2]
local verb, token = ARGV[1], ARGV[2]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local FORGET_MS = 86400000  -- a mailbox that nobody works leaves no keys behind

local function number(field)
  return tonumber(redis.call('HGET', gate, field) or '0') or 0
end

-- A cooldown that is longer than that is kept to its end.
local function keep()
  redis.call('PEXPIRE', gate, math.max(FORGET_MS, number('cool') - now))
  redis.call('PEXPIRE', slots, FORGET_MS)
end

-- Checked before anything is written: an error leaves nothing half done.
local function whole(value, what)
  local n = tonumber(value)
  if n and n >= 0 and n == math.floor(n) then return n end
  error('gate.lua: ' .. what .. ' is not a whole number')
end

-- Slots whose lane is gone fall free; those of this lane live as long as its lease.
local function count_slots(lease_until)
  local used = 0
  local all = redis.call('HGETALL', slots)
  for i = 1, #all, 2 do
    local expiry, owner = string.match(all[i + 1], '^(%d+) (.*)$')
    if owner == token then
      redis.call('HSET', slots, all[i], lease_until .. ' ' .. token)
      used = used + 1
    elseif tonumber(expiry) <= now then
      redis.call('HDEL', slots, all[i])
    else
      used = used + 1
    end
  end
  return used
end

if verb == 'ask' then
  local lease_ms, limit = whole(ARGV[3], 'lease_ms'), whole(ARGV[4], 'slots')
  local at = 5
  local given_back = whole(ARGV[at], '#given_back')
  local wanted = whole(ARGV[at + given_back + 1], '#wanted')
  if #ARGV ~= at + given_back + 1 + wanted then
    return redis.error_reply('gate.lua: the ids are not as many as said')
  end
  for i = at + 1, at + given_back do redis.call('HDEL', slots, ARGV[i]) end
  at = at + given_back + 1

  local lane, lease = redis.call('HGET', gate, 'lane'), number('lease')
  if lane and lane ~= token and lease > now then
    return {'held', 0, lease - now, number('rung'), number('trouble')}
  end
  local lease_until = now + lease_ms
  redis.call('HSET', gate, 'lane', token, 'lease', lease_until, 'bell', 0)
  local used = count_slots(lease_until)
  local cool = number('cool')
  local answer
  if cool > now then
    answer = {'cooling', 0, cool - now, number('rung'), number('trouble')}
  elseif used >= limit and wanted > 0 then
    answer = {'full', 0, lease_ms, number('rung'), number('trouble')}
  else
    local granted = math.min(wanted, limit - used)
    for i = at + 1, at + granted do
      redis.call('HSET', slots, ARGV[i], lease_until .. ' ' .. token)
    end
    answer = {'granted', granted, 0, number('rung'), number('trouble')}
  end
  keep()
  return answer

elseif verb == 'leave' then
  if redis.call('HGET', gate, 'lane') ~= token then return -1 end
  if ARGV[3] ~= '' and number('rung') ~= tonumber(ARGV[3]) then return 0 end
  redis.call('HDEL', gate, 'lane', 'lease')
  local all = redis.call('HGETALL', slots)
  for i = 1, #all, 2 do
    if string.match(all[i + 1], '^%d+ (.*)$') == token then redis.call('HDEL', slots, all[i]) end
  end
  return 1

elseif verb == 'ring' then
  local bell_ms = whole(ARGV[2], 'bell_ms')
  redis.call('HINCRBY', gate, 'rung', 1)
  keep()
  if number('lease') > now or now - number('bell') < bell_ms then return 0 end
  local cool = number('cool')
  if cool > now then return now - cool end
  redis.call('HSET', gate, 'bell', now)
  return 1

elseif verb == 'cool' then
  local cool = math.max(number('cool'), now + whole(ARGV[2], 'ms'))
  redis.call('HSET', gate, 'cool', cool)
  -- Those who failed together count once.
  if number('trouble') == tonumber(ARGV[3] or '') then redis.call('HINCRBY', gate, 'trouble', 1) end
  keep()
  return cool

elseif verb == 'calm' then
  return redis.call('HDEL', gate, 'trouble')
end

return redis.error_reply('gate.lua: unknown verb ' .. tostring(verb))
