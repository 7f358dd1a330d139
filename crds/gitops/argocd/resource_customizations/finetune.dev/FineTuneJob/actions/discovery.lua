-- Actions on a FineTuneJob in Argo CD. A job that is over, or is being deleted, has none.
local phase = obj.status ~= nil and obj.status.phase or ""
if phase == "Succeeded" or phase == "Failed" or phase == "Cancelling" then
  return {}
end

local policy = obj.spec.runPolicy or {}
local is_suspended = policy.suspend == true
local actions = {}
actions["suspend"] = { ["disabled"] = is_suspended, ["iconClass"] = "fa fa-fw fa-pause" }
actions["resume"] = { ["disabled"] = not is_suspended, ["iconClass"] = "fa fa-fw fa-play" }
-- The clock of a suspended job stands still, so its deadline would not end it.
actions["cancel"] = { ["disabled"] = is_suspended, ["iconClass"] = "fa fa-fw fa-stop" }
return actions
