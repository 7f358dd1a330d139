package main

import (
	"fmt"
	"io"
	"os"

	kustomizev1 "github.com/fluxcd/kustomize-controller/api/v1"
	"sigs.k8s.io/yaml"
)

// checkKustomization reads a manifest of Flux from standard input into Flux's own type, and refuses a field that the
// type does not have.
func checkKustomization() error {
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	var found kustomizev1.Kustomization
	if err := yaml.UnmarshalStrict(text, &found); err != nil {
		return err
	}
	if found.GroupVersionKind() != kustomizev1.GroupVersion.WithKind(kustomizev1.KustomizationKind) {
		return fmt.Errorf("it is a %s, not a Kustomization of Flux", found.GroupVersionKind())
	}
	return nil
}
