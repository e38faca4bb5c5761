-- The gate of one mailbox: its lane's lease, its slots, its windows, its cooldown. One call, all or
-- nothing. The arithmetic has a twin in limits.py, and a test wants the same answers from both.
--
-- KEYS[1]     postroom:{mailbox}:gate    hash
--               shape   which windows are kept here, and how long they are; absent: Redis forgot
--               lane    token of the lane that works this mailbox; lease  until when (ms)
--               cool    until when the mailbox rests (ms); hold  until when its lane need not come
--               trouble how often in a row its sends went wrong
--               rung    how often the lane was rung; bell  when a task was last asked for (ms)
--               bound   the limit that last kept something back, and until when (ms)
--               guest   until when a visitor waits for a slot: the lane leaves it one (ms)
--               since   how many sends ended since Graph last said "too many"
--               fewer   how many slots are left unused, because others use them; fewer_at since when
--               sum:N   what window N holds
-- KEYS[2]     postroom:{mailbox}:slots   hash: slot id -> "until(ms) lane cost1 .. cost5"
-- KEYS[3..6]  postroom:{mailbox}:NAME    lists of "first:last:amount", what ended when (ms)
-- KEYS[7]     postroom:tenant:external   the same for the tenant's window
-- KEYS[8]     postroom:tenant            hash: shape, sum, flying
-- KEYS[9]     postroom:tenant:flying     sorted set of "slot id|amount", by until (ms)
--
-- ARGV[1] is the time in ms, empty for Redis's own; ARGV[2] the verb. The windows go in the order
-- requests, messages, recipients, upload, external. LIMITS are two: the shape, and one text of the
-- slots, the percent kept for others, and amount and span (ms) of each window, -1 where it is off.
-- COST is one text of five numbers. BACK is a count and as many (slot id, age ms, 0 nothing |
-- 1 request | 2 all); WANTED a count and as many (slot id, COST).
--   ask    token lease_ms LIMITS BACK WANTED
--            -> {"granted" | "held" | "cooling" | "unknown" | the limit that binds,
--                count, wait_ms (-1: never), rung, trouble}
--   visit  token ms LIMITS BACK WANTED              as ask, beside the lane, for so long
--   back   LIMITS BACK                              -> 1
--   leave  token rung hold_ms LIMITS BACK           -> 1 gone, 0 rung meanwhile (stay), -1 not yours
--   learn  cool_ms LIMITS, then for each window a count and as many (first ms ago, last ms ago,
--          amount), then a count and as many (slot id, ms, COST)
--            -> 1; what SQL knows, where Redis forgot
--   cool   ms trouble too_many   -> until when (ms); `trouble`, as it was told, counts one more;
--                                   too_many: 1 where Graph said 429
--   calm                         -> 1 if there was trouble, now one less
--   usage  LIMITS                -> {cool ms left, bound, used of each window (-1: off)} or {}
--   ring   bell_ms news          KEYS are the gates of many mailboxes -> for each: 1 send a task,
--                                0 one is under way, or the ms left to rest, negative
redis.replicate_commands()

local WINDOWS = 5
local EXTERNAL = 5
local PARTS = 100           -- entries of a window; see limits.py
local GUEST_MS = 1000       -- a visitor that waits comes again sooner
local CLOSE = 8             -- "too many" again after fewer sends than this: not all slots are ours
local MOST_FEWER = 2        -- of Graph's four; a slot is tried again after so long:
local WIDER_MS = 30000
local FORGET_MS = 90000000  -- 25 h: a mailbox that nobody works leaves no keys behind

local at = 0
local function take()
  at = at + 1
  return ARGV[at]
end

-- Checked before anything is written: an error leaves nothing half done.
local function whole(word, what)
  local n = tonumber(word)
  if n and n == math.floor(n) then return n end
  error('gate.lua: ' .. what .. ' is not a whole number')
end

local function number(what) return whole(take(), what) end

local function numbers(count, what)
  local found = {text = take()}
  for word in string.gmatch(found.text or '', '%S+') do found[#found + 1] = whole(word, what) end
  if #found ~= count then error('gate.lua: ' .. what .. ' has not ' .. count .. ' numbers') end
  return found
end

local now = tonumber(take())
if not now then
  local clock = redis.call('TIME')
  now = clock[1] * 1000 + math.floor(clock[2] / 1000)
end
local verb = take()

local function plain(n) return string.format('%.0f', n + 0) end  -- + 0: no "-0"

if verb == 'ring' then
  local bell_ms, news = number('bell_ms'), take() == '1'
  local answers = {}
  for i, gate in ipairs(KEYS) do
    local of = redis.call('HMGET', gate, 'lease', 'bell', 'cool', 'hold')
    for j = 1, 4 do of[j] = tonumber(of[j] or '0') or 0 end
    local rest = math.max(of[3], news and 0 or of[4])
    -- A lane at work finds by itself what the sweep finds: only news makes it look anew.
    if news or of[1] <= now then redis.call('HINCRBY', gate, 'rung', 1) end
    if of[1] > now or now - of[2] < bell_ms then
      answers[i] = 0
    elseif rest > now then
      answers[i] = now - rest
    else
      redis.call('HSET', gate, 'bell', plain(now))
      answers[i] = 1
    end
    if redis.call('PTTL', gate) < 0 then redis.call('PEXPIRE', gate, FORGET_MS) end
  end
  return answers
end

local gate, slots = KEYS[1], KEYS[2]
local tenant, flying = KEYS[8], KEYS[9]

local function field(name) return tonumber(redis.call('HGET', gate, name) or '0') or 0 end

-- How many slots are left unused now.
local function fewer()
  return math.max(0, field('fewer') - math.floor((now - field('fewer_at')) / WIDER_MS))
end

-- ---- what the call says ------------------------------------------------------------------------

local shape, most_slots
local most, amount, span = {}, {}, {}
local life = FORGET_MS  -- of all keys: longer than the longest window

local function read_limits()
  shape = take()
  local told = numbers(2 + 2 * WINDOWS, 'limits')
  most_slots = told[1]
  for w = 1, WINDOWS do
    most[w], span[w] = told[1 + 2 * w], told[2 + 2 * w]
    amount[w] = most[w] - math.floor(most[w] * told[2] / 100)
    life = math.max(life, span[w] + 3600000)
  end
end

local function keep()
  redis.call('PEXPIRE', gate, math.max(life, field('cool') - now))
  redis.call('PEXPIRE', slots, life)
end

-- ---- windows -----------------------------------------------------------------------------------

local function sum_of(w)
  if w == EXTERNAL then return tonumber(redis.call('HGET', tenant, 'sum') or '0') end
  return field('sum:' .. w)
end

local function add_to_sum(w, n)
  if w == EXTERNAL then redis.call('HINCRBY', tenant, 'sum', plain(n))
  else redis.call('HINCRBY', gate, 'sum:' .. w, plain(n)) end
end

local function parts_of(entry)
  local first, last, n = string.match(entry, '^(%d+):(%d+):(%d+)$')
  return tonumber(first), tonumber(last), tonumber(n)
end

local function push(w, first, last, n)
  redis.call('RPUSH', KEYS[2 + w], plain(first) .. ':' .. plain(last) .. ':' .. plain(n))
  redis.call('PEXPIRE', KEYS[2 + w], life)
  add_to_sum(w, n)
end

-- `n` ended at `when`. What ends within span/PARTS is one entry, forgotten with its last.
local function count(w, when, n)
  if span[w] < 0 or n <= 0 then return end
  local entry = redis.call('LINDEX', KEYS[2 + w], -1)
  if entry then
    local first, last, there = parts_of(entry)
    if when - first < span[w] / PARTS then
      redis.call('LSET', KEYS[2 + w], -1,
                 plain(first) .. ':' .. plain(math.max(last, when)) .. ':' .. plain(there + n))
      add_to_sum(w, n)
      return
    end
  end
  push(w, when, when, n)
end

local function forget(w)
  if span[w] < 0 then return end
  while true do
    local entry = redis.call('LINDEX', KEYS[2 + w], 0)
    if not entry then return end
    local _, last, n = parts_of(entry)
    if last + span[w] >= now then return end
    redis.call('LPOP', KEYS[2 + w])
    add_to_sum(w, -n)
  end
end

-- How long until `surplus` of a window is forgotten; nil: it does not hold as much.
local function until_forgotten(w, surplus)
  local from = 0
  while true do
    local entries = redis.call('LRANGE', KEYS[2 + w], from, from + 19)
    if #entries == 0 then return nil end
    for _, entry in ipairs(entries) do
      local _, last, n = parts_of(entry)
      surplus = surplus - n
      if surplus <= 0 then return last + span[w] + 1 - now end
    end
    from = from + 20
  end
end

-- ---- slots -------------------------------------------------------------------------------------

local function slot_text(expiry, owner, cost)
  return plain(expiry) .. ' ' .. owner .. ' ' .. cost.text
end

local function slot_of(text)
  local expiry, owner, words = string.match(text, '^(%S+) (%S+) (.*)$')
  local cost = {text = words}
  for word in string.gmatch(words, '%S+') do cost[#cost + 1] = tonumber(word) end
  return tonumber(expiry), owner, cost
end

-- The tenant's part of a slot: all mailboxes share its window.
local function fly(id, expiry, cost)
  if span[EXTERNAL] < 0 or cost[EXTERNAL] == 0 then return end
  local added = redis.call('ZADD', flying, plain(expiry), id .. '|' .. plain(cost[EXTERNAL]))
  if added == 1 then redis.call('HINCRBY', tenant, 'flying', plain(cost[EXTERNAL])) end
  redis.call('PEXPIRE', flying, life)
  redis.call('PEXPIRE', tenant, life)
end

local function land(id, n)
  if n == 0 or redis.call('ZREM', flying, id .. '|' .. plain(n)) == 0 then return false end
  redis.call('HINCRBY', tenant, 'flying', plain(-n))
  return true
end

-- `used`: 0 nothing, 1 the request and its bytes, 2 all of its cost. Only its owner gives a slot
-- back (nobody knows that of one learned from SQL): an old lane must not free the slot of another.
local function give_back(id, when, used, owner)
  local text = redis.call('HGET', slots, id)
  if not text then return end
  local _, whose, cost = slot_of(text)
  if owner and whose ~= owner and whose ~= '-' then return end
  redis.call('HDEL', slots, id)
  if used == 2 then redis.call('HINCRBY', gate, 'since', 1) end
  for w = 1, WINDOWS do
    local counts = used == 2 or (used == 1 and (w == 1 or w == 4))
    if w == EXTERNAL and not land(id, cost[w]) then counts = false end
    if counts then count(w, when, cost[w]) end
  end
end

local function read_back()
  local back = {}
  for i = 1, number('#back') do back[i] = {take(), number('age'), number('used')} end
  return back
end

local function give_all_back(back, owner)
  for _, one in ipairs(back) do give_back(one[1], now - one[2], one[3], owner or one[1]) end
end

-- Ends slots whose time is over, as if all of their cost had been used just then; those of this
-- lane live as long as its lease. Gives how many are left, what they cost, and the first to end.
local function look_at_slots(owner, lease_until)
  local late, used, first, costs = {}, 0, nil, {0, 0, 0, 0, 0}
  local all = redis.call('HGETALL', slots)
  for i = 1, #all, 2 do
    local expiry, whose, cost = slot_of(all[i + 1])
    if whose == owner then
      expiry = lease_until
      redis.call('HSET', slots, all[i], slot_text(expiry, whose, cost))
      fly(all[i], expiry, cost)
    end
    if expiry <= now then
      late[#late + 1] = {expiry, all[i]}
    else
      used = used + 1
      first = math.min(first or expiry, expiry)
      for w = 1, WINDOWS do costs[w] = costs[w] + cost[w] end
    end
  end
  table.sort(late, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
  for _, one in ipairs(late) do give_back(one[2], one[1], 2) end
  if span[EXTERNAL] >= 0 then
    local gone = redis.call('ZRANGEBYSCORE', flying, '-inf', plain(now), 'WITHSCORES')
    for i = 1, #gone, 2 do
      local id, n = string.match(gone[i], '^(.*)|(%d+)$')
      land(id, tonumber(n))
      count(EXTERNAL, tonumber(gone[i + 1]), tonumber(n))
    end
    costs[EXTERNAL] = tonumber(redis.call('HGET', tenant, 'flying') or '0')
  end
  for w = 1, WINDOWS do forget(w) end
  return used, costs, first
end

-- ---- verbs -------------------------------------------------------------------------------------

local function forgotten()
  return redis.call('HGET', gate, 'shape') ~= shape
    or (span[EXTERNAL] >= 0 and redis.call('HGET', tenant, 'shape') ~= plain(span[EXTERNAL]))
end

local function answer(word, granted, wait)
  return {word, granted, wait, field('rung'), field('trouble')}
end

-- What keeps a cost out: the limit and for how long, or nothing.
local NAMES = {'requests', 'messages', 'recipients', 'upload', 'external'}
local function binds(used, costs, first, cost)
  if used >= most_slots then return 'slots', (first or now + 1) - now end
  local name, longest_wait
  for w = 1, WINDOWS do
    if span[w] >= 0 then
      if cost[w] > most[w] then return NAMES[w], -1 end
      -- One that is larger than its share still goes, alone.
      local surplus = costs[w] + sum_of(w) + cost[w] - math.max(amount[w], cost[w])
      if cost[w] > 0 and surplus > 0 then
        local wait = until_forgotten(w, surplus) or (first or now + 1) - now
        if not name or wait > longest_wait then name, longest_wait = NAMES[w], wait end
      end
    end
  end
  return name, longest_wait
end

local function grant(owner, expiry, used, costs, first, wanted)
  local granted = 0
  for _, one in ipairs(wanted) do
    local name, wait = binds(used, costs, first, one[2])
    if name then
      if name ~= 'slots' then redis.call('HSET', gate, 'bound', name .. ' ' .. plain(now + wait)) end
      if granted == 0 then return answer(name, 0, wait) end
      break
    end
    redis.call('HSET', slots, one[1], slot_text(expiry, owner, one[2]))
    fly(one[1], expiry, one[2])
    for w = 1, WINDOWS do costs[w] = costs[w] + one[2][w] end
    used, first, granted = used + 1, math.min(first or expiry, expiry), granted + 1
  end
  return answer('granted', granted, 0)
end

local function read_wanted()
  local wanted = {}
  for i = 1, number('#wanted') do wanted[i] = {take(), numbers(WINDOWS, 'cost')} end
  if at ~= #ARGV then error('gate.lua: the arguments are more than said') end
  return wanted
end

if verb == 'ask' or verb == 'visit' then
  local token, lease_until = take(), now + number('ms')
  read_limits()
  local back, wanted = read_back(), read_wanted()
  if forgotten() then return answer('unknown', 0, 0) end
  give_all_back(back, token)
  if verb == 'ask' then
    local lane, lease = redis.call('HGET', gate, 'lane'), field('lease')
    if lane ~= token and lease > now then return answer('held', 0, lease - now) end
    redis.call('HSET', gate, 'lane', token, 'lease', plain(lease_until), 'bell', 0, 'hold', 0)
  end
  local used, costs, first = look_at_slots(verb == 'ask' and token or '', lease_until)
  local said
  most_slots = math.max(1, most_slots - fewer())
  -- A lane that takes each slot as it falls free would keep visitors out until its work is done.
  if verb == 'ask' and most_slots > 1 and field('guest') > now then most_slots = most_slots - 1 end
  if field('cool') > now then said = answer('cooling', 0, field('cool') - now)
  else said = grant(token, lease_until, used, costs, first, wanted) end
  if verb == 'visit' then
    redis.call('HSET', gate, 'guest', said[1] == 'slots' and plain(now + GUEST_MS) or 0)
  end
  keep()
  return said

elseif verb == 'back' then
  read_limits()
  local back = read_back()
  if not forgotten() then give_all_back(back) end
  return 1

elseif verb == 'leave' then
  local token, rung, hold_ms = take(), take(), number('hold_ms')
  read_limits()
  local back = read_back()
  if forgotten() then return -1 end
  give_all_back(back, token)
  if redis.call('HGET', gate, 'lane') ~= token then return -1 end
  if rung ~= '' and field('rung') ~= tonumber(rung) then return 0 end
  redis.call('HDEL', gate, 'lane', 'lease')
  redis.call('HSET', gate, 'hold', plain(hold_ms > 0 and now + hold_ms or 0))
  return 1

elseif verb == 'learn' then
  local cool_ms = number('cool_ms')
  read_limits()
  local past, known = {}, {}
  for w = 1, WINDOWS do
    past[w] = {}
    for i = 1, number('#entries') do
      past[w][i] = {now - number('first'), now - number('last'), number('amount')}
    end
  end
  for i = 1, number('#slots') do known[i] = {take(), now + number('ms'), numbers(WINDOWS, 'cost')} end
  local mine = redis.call('HGET', gate, 'shape') ~= shape
  local theirs = span[EXTERNAL] >= 0
    and redis.call('HGET', tenant, 'shape') ~= plain(span[EXTERNAL])
  for w = 1, WINDOWS do
    local wanted = w == EXTERNAL and theirs or w ~= EXTERNAL and mine
    if wanted then
      redis.call('DEL', KEYS[2 + w])
      add_to_sum(w, -sum_of(w))
      if span[w] >= 0 then
        for _, entry in ipairs(past[w]) do push(w, entry[1], entry[2], entry[3]) end
      end
    end
  end
  if theirs then redis.call('HSET', tenant, 'shape', plain(span[EXTERNAL])) end
  if mine then
    redis.call('HSET', gate, 'shape', shape,
               'cool', plain(math.max(field('cool'), now + cool_ms)))
    for _, slot in ipairs(known) do
      redis.call('HSET', slots, slot[1], slot_text(slot[2], '-', slot[3]))
      fly(slot[1], slot[2], slot[3])
    end
  end
  keep()
  return 1

elseif verb == 'cool' then
  local rests = field('cool') > now  -- already: what comes now flew together with the first
  local cool = math.max(field('cool'), now + number('ms'))
  local trouble, too_many = tonumber(take() or ''), take() == '1'
  if too_many and not rests then
    local since = tonumber(redis.call('HGET', gate, 'since') or '')
    if since and since < CLOSE then
      redis.call('HSET', gate, 'fewer', plain(math.min(MOST_FEWER, fewer() + 1)),
                 'fewer_at', plain(now))
    end
    redis.call('HSET', gate, 'since', 0)
  end
  redis.call('HSET', gate, 'cool', plain(cool))
  -- Those who failed together count once.
  if trouble and field('trouble') == trouble then redis.call('HINCRBY', gate, 'trouble', 1) end
  redis.call('PEXPIRE', gate, math.max(FORGET_MS, cool - now))
  return cool

elseif verb == 'calm' then
  local trouble = field('trouble')
  if trouble > 1 then redis.call('HINCRBY', gate, 'trouble', -1)
  else redis.call('HDEL', gate, 'trouble') end
  return trouble > 0 and 1 or 0

elseif verb == 'usage' then
  read_limits()
  if forgotten() then return {} end
  local _, costs = look_at_slots('', now)
  local bound, till = string.match(redis.call('HGET', gate, 'bound') or '', '^(%S+) (%d+)$')
  local found = {math.max(0, field('cool') - now), (tonumber(till) or 0) > now and bound or ''}
  for w = 1, WINDOWS do found[2 + w] = span[w] < 0 and -1 or costs[w] + sum_of(w) end
  return found
end

return redis.error_reply('gate.lua: unknown verb ' .. tostring(verb))
