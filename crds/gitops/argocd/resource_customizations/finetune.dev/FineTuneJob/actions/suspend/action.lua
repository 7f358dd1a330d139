-- The trainer writes a checkpoint and gives its GPUs back.
obj.spec.runPolicy = obj.spec.runPolicy or {}
obj.spec.runPolicy.suspend = true
return obj
