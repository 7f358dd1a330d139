-- Health of a FineTuneJob in Argo CD. Uses no library, so it needs no useOpenLibs.
local health = { status = "Progressing", message = "waiting for finetune-operator to look at the job" }

local status = obj.status
if status == nil or status.conditions == nil then
  return health
end
if status.observedGeneration ~= obj.metadata.generation then
  health.message = "waiting for finetune-operator to look at generation " .. obj.metadata.generation
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions) do
  conditions[condition.type] = condition
end
local function is_true(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end

local ready = conditions["Ready"]
if ready == nil then
  return health
end
health.message = ready.reason .. ": " .. (ready.message or "")

if is_true("Ready") then
  health.status = "Healthy"
elseif is_true("Stalled") then
  -- The job has failed, or nothing goes on without a person.
  health.status = "Degraded"
  if status.failure ~= nil and status.failure.hint ~= nil then
    health.message = health.message .. ". " .. status.failure.hint
  end
elseif is_true("Suspended") then
  health.status = "Suspended"
elseif status.progress ~= nil and status.progress.completion ~= nil then
  health.message = status.progress.completion .. ", " .. health.message
end
return health
