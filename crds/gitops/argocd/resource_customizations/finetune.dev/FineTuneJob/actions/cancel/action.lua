-- Ends the job for good: it fails with DeadlineExceeded as soon as its trainer has written a checkpoint. Deleting it
-- instead would make Argo CD create it again from Git.
obj.spec.runPolicy = obj.spec.runPolicy or {}
obj.spec.runPolicy.activeDeadlineSeconds = 1
return obj
