-- The inbox: chunks of batches on their way from the producers to SQL. Redis 6.2 or later.
--
-- KEYS[1] postroom:inbox          stream of chunks: batch, n, count, first (position), size, digest,
--                                 body
-- KEYS[2] postroom:inbox:bytes    how many bytes of bodies wait: the budget's counter
-- KEYS[3] postroom:inbox:bell     there while somebody was rung and has not looked yet
-- KEYS[4] postroom:batch:{id}     hash: head, digest, chunks, messages, arrived, c:<n> = count
-- The consumer group is `postroom`.
--
-- ARGV[1] is the verb:
--   append batch n digest head chunks messages count chunk_digest body budget bell_ms first
--          -> {"created" | "exists" | "conflict" | "full", ring (0 or 1)}
--   done   id size id size ...      -> how many were taken away now; twice is harmless

redis.replicate_commands()  -- INFO is no constant

local stream, bytes, bell, hash = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

if ARGV[1] == 'done' then
  local gone = 0
  for i = 2, #ARGV, 2 do
    redis.call('XACK', stream, 'postroom', ARGV[i])
    if redis.call('XDEL', stream, ARGV[i]) == 1 then
      redis.call('DECRBY', bytes, ARGV[i + 1])
      gone = gone + 1
    end
  end
  -- An empty inbox holds nothing, whatever a lost counter says.
  if redis.call('XLEN', stream) == 0 then redis.call('DEL', bytes) end
  return gone
end

local batch, n, digest, head, chunks, messages = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local count, chunk_digest, body, budget, bell_ms = ARGV[8], ARGV[9], ARGV[10], ARGV[11], ARGV[12]
local first = ARGV[13]

-- Well before Redis itself is full: gates, tokens and tasks need room too. Where INFO is forbidden,
-- Redis's own refusal below must do.
local function memory_is_short()
  local info = redis.pcall('INFO', 'memory')
  if type(info) ~= 'string' then return false end
  local most = tonumber(string.match(info, 'maxmemory:(%d+)') or '0')
  local used = tonumber(string.match(info, 'used_memory:(%d+)') or '0')
  return most > 0 and used + 2 * #body > 0.8 * most
end

local known = redis.call('HGET', hash, 'digest')
if known and known ~= digest then return {'conflict', 0} end
if redis.call('HEXISTS', hash, 'c:' .. n) == 1 then return {'exists', 0} end

local waiting = tonumber(redis.call('GET', bytes) or '0')
-- What is larger than the whole budget passes alone: else it never would.
if waiting > 0 and waiting + #body > tonumber(budget) then return {'full', 0} end
if memory_is_short() then return {'full', 0} end

-- The first write is one that a full Redis refuses, so that it refuses all of it.
if redis.call('EXISTS', stream) == 0 then
  redis.call('XGROUP', 'CREATE', stream, 'postroom', '0', 'MKSTREAM')
end
redis.call('XADD', stream, '*', 'batch', batch, 'n', n, 'count', count, 'first', first,
           'size', #body, 'digest', chunk_digest, 'body', body)
redis.call('INCRBY', bytes, #body)
redis.call('HSET', hash, 'head', head, 'digest', digest, 'chunks', chunks, 'messages', messages,
           'c:' .. n, count)
redis.call('HINCRBY', hash, 'arrived', count)
redis.call('PERSIST', hash)
local rung = redis.call('SET', bell, '1', 'NX', 'PX', bell_ms)
return {'created', rung and 1 or 0}
