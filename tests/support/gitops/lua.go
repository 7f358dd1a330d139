package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	lua "github.com/yuin/gopher-lua"
	luajson "layeh.com/gopher-json"
)

// scriptSeconds is what Argo CD gives a script.
const scriptSeconds = 1

// askLua runs the scripts that are given: health, discovery, and every action.
func askLua(object json.RawMessage, request *Request, answer *Answer) error {
	if request.Health != "" {
		answer.Argo = &Verdict{}
		if result, err := runScript(object, request.Health); err != nil {
			answer.Argo.Error = err.Error()
		} else if err := json.Unmarshal(result, answer.Argo); err != nil {
			answer.Argo.Error = fmt.Sprintf("health.lua returned %s: %v", result, err)
		}
	}
	if request.Discovery != "" {
		result, err := runScript(object, request.Discovery)
		if err != nil {
			return fmt.Errorf("discovery.lua: %w", err)
		}
		answer.Discovered = result
	}
	for name, script := range request.Actions {
		result, err := runScript(object, script)
		if err != nil {
			return fmt.Errorf("action %s: %w", name, err)
		}
		answer.Acted[name] = result
	}
	return nil
}

// runScript runs one script as Argo CD runs those of argocd-cm: the object is the global `obj`, the result a table.
// Only the libraries are open that Argo CD opens there (package, base, table), without its cut-down `os`: a script that
// uses `string` or `os` fails here.
func runScript(object json.RawMessage, script string) (json.RawMessage, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage,
		lua.BaseLibName: lua.OpenBase,
		lua.TabLibName:  lua.OpenTable,
	} {
		call := lua.P{Fn: state.NewFunction(open), NRet: 0, Protect: true}
		if err := state.CallByParam(call, lua.LString(name)); err != nil {
			return nil, err
		}
	}

	limit, cancel := context.WithTimeout(context.Background(), scriptSeconds*time.Second)
	defer cancel()
	state.SetContext(limit)
	value, err := luajson.Decode(state, object)
	if err != nil {
		return nil, err
	}
	state.SetGlobal("obj", value)
	if err := state.DoString(script); err != nil {
		return nil, err
	}

	result := state.Get(-1)
	if result.Type() != lua.LTTable {
		return nil, fmt.Errorf("the script returned a %s, not a table", result.Type())
	}
	return luajson.Encode(result)
}
