// Renders templates as Ollama does: .System holds the system message, .Messages all of them.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type task struct {
	Template string
	Messages []*message
}

func main() {
	var tasks []task
	if err := json.NewDecoder(os.Stdin).Decode(&tasks); err != nil {
		log.Fatal(err)
	}
	rendered := []string{}
	for _, each := range tasks {
		system := ""
		for _, m := range each.Messages {
			if m.Role == "system" {
				system = m.Content
			}
		}
		parsed, err := template.New("").Option("missingkey=zero").Parse(each.Template)
		if err != nil {
			log.Fatal(err)
		}
		var text strings.Builder
		if err := parsed.Execute(&text, map[string]any{"System": system, "Messages": each.Messages}); err != nil {
			log.Fatal(err)
		}
		rendered = append(rendered, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil {
		log.Fatal(err)
	}
}
