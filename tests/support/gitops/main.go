// Program gitops asks what Argo CD, Flux and kubectl's relatives ask about an object: how is it? Each answer comes
// from the tool's own library. It reads one JSON request from standard input and writes one JSON answer.
//
//	{"objects": [...], "expressions": {"done": {"current": "...", "failed": "...", "inProgress": "..."}},
//	 "health": "<Lua>", "discovery": "<Lua>", "actions": {"suspend": "<Lua>"}}
//
// `gitops kustomization` checks a manifest of Flux instead.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	fluxstatus "github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

// Request is what to judge, and by which expressions and scripts.
type Request struct {
	Objects     []json.RawMessage                           `json:"objects"`
	Expressions map[string]kustomize.HealthCheckExpressions `json:"expressions"`
	Health      string                                      `json:"health"`
	Discovery   string                                      `json:"discovery"`
	Actions     map[string]string                           `json:"actions"`
}

// Verdict is what one judge says about one object; Error, if it could not say anything.
type Verdict struct {
	Status  string `json:"status,omitempty"`
	Message string `json:"message,omitempty"`
	Error   string `json:"error,omitempty"`
}

// Answer is about one object.
type Answer struct {
	Kstatus     Verdict                    `json:"kstatus"`     // sigs.k8s.io/cli-utils
	FluxKstatus Verdict                    `json:"fluxKstatus"` // Flux's fork of it, for a Kustomization without expressions
	Flux        map[string]Verdict         `json:"flux"`        // by name of the expressions
	Argo        *Verdict                   `json:"argo,omitempty"`
	Discovered  json.RawMessage            `json:"discovered,omitempty"`
	Acted       map[string]json.RawMessage `json:"acted,omitempty"`
}

func main() {
	work := run
	if len(os.Args) > 1 && os.Args[1] == "kustomization" {
		work = checkKustomization
	}
	if err := work(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var request Request
	decoder := json.NewDecoder(os.Stdin)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&request); err != nil {
		return fmt.Errorf("the request: %w", err)
	}

	answers := []Answer{}
	for _, object := range request.Objects {
		answer, err := judge(object, &request)
		if err != nil {
			return err
		}
		answers = append(answers, *answer)
	}
	return json.NewEncoder(os.Stdout).Encode(answers)
}

func judge(raw json.RawMessage, request *Request) (*Answer, error) {
	object := &unstructured.Unstructured{}
	if err := object.UnmarshalJSON(raw); err != nil {
		return nil, fmt.Errorf("an object: %w", err)
	}
	answer := &Answer{Flux: map[string]Verdict{}, Acted: map[string]json.RawMessage{}}

	if found, err := status.Compute(object); err != nil {
		answer.Kstatus.Error = err.Error()
	} else {
		answer.Kstatus = Verdict{Status: found.Status.String(), Message: found.Message}
	}
	if found, err := fluxstatus.Compute(object); err != nil {
		answer.FluxKstatus.Error = err.Error()
	} else {
		answer.FluxKstatus = Verdict{Status: found.Status.String(), Message: found.Message}
	}
	for name, expressions := range request.Expressions {
		answer.Flux[name] = evaluate(object, &expressions)
	}
	return answer, askLua(raw, request, answer)
}

// evaluate does what Flux's kustomize-controller does with spec.healthCheckExprs.
func evaluate(object *unstructured.Unstructured, expressions *kustomize.HealthCheckExpressions) Verdict {
	evaluator, err := cel.NewStatusEvaluator(expressions)
	if err != nil {
		return Verdict{Error: err.Error()}
	}
	found, err := evaluator.Evaluate(context.Background(), object)
	if err != nil {
		return Verdict{Error: err.Error()}
	}
	return Verdict{Status: found.Status.String(), Message: found.Message}
}
