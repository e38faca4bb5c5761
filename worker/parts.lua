-- Parts of attachments on their way from the producers to SQL. Redis 6.2 or later.
--
-- KEYS[1] postroom:parts            stream of parts: sha, size, n, part
-- KEYS[2] postroom:parts:bytes      how many bytes of parts wait
-- KEYS[3] postroom:content:{sha}    hash: n = 1 for each part that was appended of late
-- KEYS[4] postroom:inbox:bytes      how many bytes of messages wait: they share the budget
-- The consumer group is `postroom`.
--
-- ARGV[1] is the verb:
--   append sha size n part budget   -> "created" | "exists" | "full"
--   done   forget_s id bytes sha    -> 1 if it was taken away now; twice is harmless

redis.replicate_commands()  -- INFO is no constant

local stream, bytes, hash, inbox = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

if ARGV[1] == 'done' then
  redis.call('XACK', stream, 'postroom', ARGV[3])
  local gone = redis.call('XDEL', stream, ARGV[3])
  if gone == 1 then redis.call('DECRBY', bytes, ARGV[4]) end
  -- SQL has it. For a while the same content need not come again; not for long: what Redis
  -- remembers of SQL may be wrong.
  redis.call('EXPIRE', hash, ARGV[2])
  if redis.call('XLEN', stream) == 0 then redis.call('DEL', bytes) end
  return gone
end

local sha, size, n, part, budget = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

if redis.call('HEXISTS', hash, n) == 1 then return 'exists' end

local waiting = tonumber(redis.call('GET', bytes) or '0') + tonumber(redis.call('GET', inbox) or '0')
-- What is larger than the whole budget passes alone: else it never would.
if waiting > 0 and waiting + #part > tonumber(budget) then return 'full' end

-- Well before Redis itself is full, as in inbox.lua.
local info = redis.pcall('INFO', 'memory')
if type(info) == 'string' then
  local most = tonumber(string.match(info, 'maxmemory:(%d+)') or '0')
  local used = tonumber(string.match(info, 'used_memory:(%d+)') or '0')
  if most > 0 and used + 2 * #part > 0.8 * most then return 'full' end
end

-- The first write is one that a full Redis refuses, so that it refuses all of it.
if redis.call('EXISTS', stream) == 0 then
  redis.call('XGROUP', 'CREATE', stream, 'postroom', '0', 'MKSTREAM')
end
redis.call('XADD', stream, '*', 'sha', sha, 'size', size, 'n', n, 'part', part)
redis.call('INCRBY', bytes, #part)
redis.call('HSET', hash, n, '1')
redis.call('PERSIST', hash)
return 'created'
