package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v4"

	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/source/etcd"
	"github.com/pentad/pentad/view"
)

// storePatience bounds one command that speaks to etcd.
const storePatience = 15 * time.Second

// withStore does something with the objects of the fleet that the host's file names.
func withStore(cmd *cobra.Command, file string, do func(context.Context, etcd.Objects) error) error {
	c, err := config.Load(file)
	if err != nil {
		return err
	}
	if c.Source.Etcd == nil {
		return fmt.Errorf("%s names no etcd: source.etcd", file)
	}
	ctx, stop := context.WithTimeout(cmd.Context(), storePatience)
	defer stop()
	client, err := etcd.Connect(ctx, c.Source.Etcd)
	if err != nil {
		return err
	}
	defer client.Close()
	if err = do(ctx, etcd.Objects{Client: client, Prefix: c.Source.Etcd.Prefix}); err != nil {
		return etcd.Explain(cmd.Context(), c.Source.Etcd, err)
	}
	return nil
}

// whoami is who changes something, for the history.
func whoami() string {
	name := os.Getenv("SUDO_USER")
	if u, err := user.Current(); name == "" && err == nil {
		name = u.Username
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return cmp.Or(name, "unknown") + "@" + host
}

func newGet() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "get [NAME]",
		Short: "Show the services that the hosts of a fleet share",
		Long: "Show the services that lie in the etcd of the fleet, or the text of one of them. With -o yaml the output is a\n" +
			"file that `pentad apply` takes.",
		Example: "  pentad get\n  pentad get shop-db\n  pentad get -o yaml",
		Args:    wants("[NAME]"),
	}
	addConfigFlag(cmd, &file)
	o := addList(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withStore(cmd, file, func(ctx context.Context, store etcd.Objects) error {
			all, err := store.All(ctx)
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if len(args) == 1 {
				i := slices.IndexFunc(all, func(s etcd.Stored) bool { return s.Name == args[0] })
				if i < 0 {
					return noObject(args[0])
				}
				if o.format == "table" || o.format == "wide" {
					_, err := w.Write(all[i].Text)
					return err
				}
				all = all[i : i+1]
			}
			return printObjects(w, o, all)
		})
	}
	return cmd
}

func noObject(name string) error {
	return fmt.Errorf("the fleet has no service %s; `pentad get` lists them", name)
}

// printObjects prints objects as a table, or as a file.
func printObjects(w io.Writer, o *output, all []etcd.Stored) error {
	if o.format == "json" || o.format == "yaml" {
		f, err := fileOf(all)
		if err != nil {
			return err
		}
		if o.format == "json" {
			return writeJSON(w, f)
		}
		return writeYAML(w, f)
	}
	var rows [][]string
	for _, s := range all {
		object, err := config.ParseObject(s.Name, s.Text)
		if err != nil {
			rows = append(rows, []string{s.Name, "-", "-", "-", "not valid: " + strings.ReplaceAll(err.Error(), "\n", "; ")})
			continue
		}
		var listen []string
		backends := 0
		for _, x := range object.Services {
			for _, l := range x.Listeners {
				listen = append(listen, l.String())
			}
			backends = max(backends, len(x.Backends))
		}
		rows = append(rows, []string{s.Name, or(strings.Join(listen, ", "), "-"), fmt.Sprint(backends), or(selectorText(object.Selector), "every host"), or(map[bool]string{true: "disabled"}[len(object.Services) == 0], "valid")})
	}
	return o.print(w, []string{"NAME", "LISTEN", "BACKENDS", "HOSTS", "STATE"}, rows)
}

func selectorText(labels map[string]string) string {
	var all []string
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		all = append(all, key+"="+labels[key])
	}
	return strings.Join(all, ",")
}

// fileOf returns objects as a file has them.
func fileOf(all []etcd.Stored) (map[string]any, error) {
	services := []any{}
	for _, s := range all {
		var one map[string]any
		if err := yaml.Unmarshal(s.Text, &one); err != nil {
			return nil, fmt.Errorf("service %s: %w", s.Name, err)
		}
		one["name"] = s.Name
		services = append(services, one)
	}
	return map[string]any{"services": services}, nil
}

func newApply() *cobra.Command {
	var file, from, why string
	var prune, dry bool
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Put the services of a file into the etcd of a fleet",
		Long: "Put the services of a file into the etcd of the fleet, from where all hosts take them. The file has the schema of\n" +
			"pentad.yaml; a service may have a `selector` with labels of the hosts that take it. Sections that are for one host\n" +
			"(scope, api, ...) stay in its file, and are named. Everything is checked before anything is written, and written only if\n" +
			"nobody else has changed it meanwhile: up to 120 services in one transaction.",
		Example: "  pentad apply -f services.yaml --dry-run\n  pentad apply -f /etc/pentad/pentad.yaml --why 'moved to the fleet'",
		Args:    wants(),
	}
	addConfigFlag(cmd, &file)
	cmd.Flags().StringVarP(&from, "filename", "f", "", "the file; - is the standard input")
	cmd.Flags().StringVar(&why, "why", "", "what the history says of it")
	cmd.Flags().BoolVar(&prune, "prune", false, "delete the services of the fleet that are not in the file")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only show what would change")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if from == "" {
			return misused(cmd, "-f FILE is missing")
		}
		wanted, left, err := readObjects(cmd, from)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			fmt.Fprintf(cmd.ErrOrStderr(), "what is for one host stays in its file: %s\n", strings.Join(left, ", "))
		}
		return withStore(cmd, file, func(ctx context.Context, store etcd.Objects) error {
			there, err := store.All(ctx)
			if err != nil {
				return err
			}
			return write(ctx, cmd, store, there, etcd.Plan(there, wanted, prune), why, dry)
		})
	}
	return cmd
}

func readObjects(cmd *cobra.Command, from string) (wanted []config.ObjectText, left []string, err error) {
	var data []byte
	if from == "-" {
		from = "standard input"
		data, err = io.ReadAll(cmd.InOrStdin())
	} else {
		data, err = config.Read(from)
	}
	if err != nil {
		return nil, nil, err
	}
	return config.Objects(from, data)
}

// write checks what the fleet would be, and writes it.
func write(ctx context.Context, cmd *cobra.Command, store etcd.Objects, there []etcd.Stored, edits []etcd.Edit, why string, dry bool) error {
	w := cmd.OutOrStdout()
	if len(edits) == 0 {
		_, err := fmt.Fprintln(w, "nothing would change")
		return err
	}
	// What was wrong before is not the fault of this change.
	texts := make([]config.ObjectText, len(there))
	for i, s := range there {
		texts[i] = s.ObjectText
	}
	before := config.Conflicts(texts)
	var errs []error
	for _, problem := range config.Conflicts(etcd.After(there, edits)) {
		if !slices.Contains(before, problem) {
			errs = append(errs, errors.New(problem))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if !dry {
		written, err := store.Write(ctx, edits, there, whoami(), why)
		edits = edits[:written]
		if err != nil {
			printEdits(w, edits, false)
			return fmt.Errorf("%d services were written: %w", written, err)
		}
	}
	printEdits(w, edits, dry)
	return nil
}

func printEdits(w io.Writer, edits []etcd.Edit, dry bool) {
	would := ""
	if dry {
		would = "would be "
	}
	for _, e := range edits {
		sign, what := "+", "created"
		switch {
		case e.After == nil:
			sign, what = "-", "deleted"
		case e.Before != nil:
			sign, what = "~", "changed"
		}
		fmt.Fprintf(w, "%s service %s %s%s\n", sign, e.Name, would, what)
		if e.Before != nil && e.After != nil {
			printLines(w, *e.Before, *e.After)
		}
	}
}

// printLines shows the lines that are not in both.
func printLines(w io.Writer, before, after string) {
	has := func(text string) map[string]int {
		n := make(map[string]int)
		for line := range strings.Lines(text) {
			n[line]++
		}
		return n
	}
	is, was := has(after), has(before)
	for line := range strings.Lines(before) {
		if is[line]--; is[line] < 0 {
			fmt.Fprintf(w, "    - %s\n", strings.TrimRight(line, "\n"))
		}
	}
	for line := range strings.Lines(after) {
		if was[line]--; was[line] < 0 {
			fmt.Fprintf(w, "    + %s\n", strings.TrimRight(line, "\n"))
		}
	}
}

func newDelete() *cobra.Command {
	var file, why string
	cmd := &cobra.Command{
		Use:     "delete NAME...",
		Short:   "Delete services of a fleet",
		Long:    "Delete services from the etcd of the fleet: all hosts stop to serve them. `pentad rollback` brings them back.",
		Example: "  pentad delete shop-db",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return misused(cmd, "NAME is missing")
			}
			return nil
		},
	}
	addConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&why, "why", "", "what the history says of it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withStore(cmd, file, func(ctx context.Context, store etcd.Objects) error {
			there, err := store.All(ctx)
			if err != nil {
				return err
			}
			var edits []etcd.Edit
			for _, name := range args {
				i := slices.IndexFunc(there, func(s etcd.Stored) bool { return s.Name == name })
				if i < 0 {
					return noObject(name)
				}
				before := string(there[i].Text)
				edits = append(edits, etcd.Edit{Name: name, Before: &before})
			}
			return write(ctx, cmd, store, there, edits, why, false)
		})
	}
	return cmd
}

func newEdit() *cobra.Command {
	var file, why string
	cmd := &cobra.Command{
		Use:   "edit NAME",
		Short: "Change a service of a fleet in an editor",
		Long: "Change the text of a service of the fleet in $VISUAL or $EDITOR (vi without). It is checked before it is written; a\n" +
			"text that is not valid is kept in a file, which is named. One that does not exist yet is made.",
		Example: "  EDITOR=nano pentad edit shop-db",
		Args:    wants("NAME"),
	}
	addConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&why, "why", "", "what the history says of it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var there []etcd.Stored
		if err := withStore(cmd, file, func(ctx context.Context, store etcd.Objects) (err error) {
			there, err = store.All(ctx)
			return err
		}); err != nil {
			return err
		}
		text := []byte("listen: []\nbackends: []\n")
		if i := slices.IndexFunc(there, func(s etcd.Stored) bool { return s.Name == args[0] }); i >= 0 {
			text = there[i].Text
		}
		after, err := edited(cmd, args[0], text)
		if err != nil {
			return err
		}
		return withStore(cmd, file, func(ctx context.Context, store etcd.Objects) error {
			return write(ctx, cmd, store, there, etcd.Plan(there, []config.ObjectText{{Name: args[0], Text: after}}, false), why, false)
		})
	}
	return cmd
}

// edited has somebody edit a text, and returns it if it is valid.
func edited(cmd *cobra.Command, name string, text []byte) ([]byte, error) {
	f, err := os.CreateTemp("", "pentad-"+strings.ReplaceAll(name, "/", "-")+"-*.yaml")
	if err != nil {
		return nil, err
	}
	path := f.Name()
	if _, err := f.Write(text); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	editor := strings.Fields(cmp.Or(os.Getenv("VISUAL"), os.Getenv("EDITOR"), "vi"))
	run := exec.CommandContext(cmd.Context(), editor[0], append(editor[1:], path)...)
	run.Stdin, run.Stdout, run.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := run.Run(); err != nil {
		return nil, fmt.Errorf("the editor %s: %w", editor[0], err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if _, err := config.ParseObject(name, after); err != nil {
		return nil, fmt.Errorf("nothing was written, your text is in %s:\n%w", path, err)
	}
	return after, os.Remove(path)
}

func newHistory() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "history [NAME]",
		Short: "Show who changed the services of a fleet, what, and when",
		Long: "Show who changed the services of the fleet with `pentad apply`, edit, delete and rollback, the newest first. The last\n" +
			"1,000 changes are kept.",
		Example: "  pentad history\n  pentad history shop-db -o yaml",
		Args:    wants("[NAME]"),
	}
	addConfigFlag(cmd, &file)
	o := addList(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withStore(cmd, file, func(ctx context.Context, store etcd.Objects) error {
			all, err := store.History(ctx, strings.Join(args, ""))
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if done, err := o.structured(w, all); done {
				return err
			}
			var rows [][]string
			for _, r := range all {
				rows = append(rows, []string{r.ID, r.By, view.Ago(r.At) + " ago", editsText(r.Edits), or(r.Why, "-")})
			}
			return o.print(w, []string{"ID", "BY", "WHEN", "WHAT", "WHY"}, rows)
		})
	}
	return cmd
}

// shownEdits is how many services a line of the history names.
const shownEdits = 5

func editsText(edits []etcd.Edit) string {
	var all []string
	for i, e := range edits {
		if i == shownEdits {
			all = append(all, fmt.Sprintf("and %d more", len(edits)-i))
			break
		}
		sign := "~"
		switch {
		case e.Before == nil:
			sign = "+"
		case e.After == nil:
			sign = "-"
		}
		all = append(all, sign+e.Name)
	}
	return strings.Join(all, " ")
}

func newRollback() *cobra.Command {
	var file, to string
	cmd := &cobra.Command{
		Use:   "rollback NAME",
		Short: "Take the last change of a service of a fleet back",
		Long: "Make a service of the fleet what it was before its last change, or before the one that --before names\n" +
			"(`pentad history` lists them). A service that was deleted comes back, one that was made goes.",
		Example: "  pentad rollback shop-db",
		Args:    wants("NAME"),
	}
	addConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&to, "before", "", "the ID of the change that is taken back, with all that came after it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withStore(cmd, file, func(ctx context.Context, store etcd.Objects) error {
			there, err := store.All(ctx)
			if err != nil {
				return err
			}
			records, err := store.History(ctx, args[0])
			if err != nil {
				return err
			}
			i := 0
			if to != "" {
				i = slices.IndexFunc(records, func(r etcd.Record) bool { return r.ID == to })
			}
			if i < 0 || len(records) == 0 {
				return fmt.Errorf("the history has no such change of %s; `pentad history %s` lists them", args[0], args[0])
			}
			return write(ctx, cmd, store, there, backTo(there, args[0], records[i].Edits[0].Before), "rollback of "+records[i].ID, false)
		})
	}
	return cmd
}

// backTo returns the edit that makes an object what it was.
func backTo(there []etcd.Stored, name string, was *string) []etcd.Edit {
	if was != nil {
		return etcd.Plan(there, []config.ObjectText{{Name: name, Text: []byte(*was)}}, false)
	}
	i := slices.IndexFunc(there, func(s etcd.Stored) bool { return s.Name == name })
	if i < 0 {
		return nil
	}
	before := string(there[i].Text)
	return []etcd.Edit{{Name: name, Before: &before}}
}

func newFleet() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fleet",
		Short: "Show the hosts of a fleet",
	}
	cmd.AddCommand(newFleetStatus(), newFleetForget())
	return cmd
}

func newFleetStatus() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how all hosts of a fleet are: who is behind, who is broken, who is silent",
		Long: "Show the hosts that have reported to the etcd of the fleet. A host whose agent is silent goes on serving what its\n" +
			"kernel has. Exit code 0: all are alive, have what lies in etcd now, and no problems; 1: some are not, or have not.",
		Example: "  pentad fleet status\n  pentad fleet status --watch",
		Args:    wants(),
	}
	addConfigFlag(cmd, &file)
	o := addList(cmd)
	watch := addWatch(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		healthy := true
		err := watch.run(cmd, func(w io.Writer) error {
			return withStore(cmd, file, func(ctx context.Context, store etcd.Objects) error {
				all, err := store.Hosts(ctx)
				if err != nil {
					return err
				}
				healthy = !slices.ContainsFunc(all, func(h etcd.Host) bool { return !h.Alive || h.Behind || len(h.Problems) > 0 })
				if done, err := o.structured(w, all); done {
					return err
				}
				return printHosts(w, o, all)
			})
		})
		if err == nil && !healthy {
			err = errNo
		}
		return err
	}
	return cmd
}

func printHosts(w io.Writer, o *output, all []etcd.Host) error {
	var rows [][]string
	for _, h := range all {
		rows = append(rows, []string{h.Name, or(selectorText(h.Labels), "-"), or(h.Version, "-"), fmt.Sprint(h.Services), fmt.Sprint(h.Warnings), hostState(h)})
		for _, p := range h.Problems {
			rows = append(rows, []string{"", "", "", "", "", "PROBLEM " + strings.ReplaceAll(p, "\n", "; ")})
		}
	}
	return o.print(w, []string{"HOST", "LABELS", "VERSION", "SERVICES", "WARNINGS", "STATE"}, rows)
}

func hostState(h etcd.Host) string {
	switch {
	case !h.Alive:
		return fmt.Sprintf("silent, last change %s ago", view.Ago(h.Written))
	case h.Behind:
		return "behind: it has not all that lies in etcd now"
	case len(h.Problems) > 0:
		return view.Count(len(h.Problems), "problem")
	default:
		return "up to date"
	}
}

func newFleetForget() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:     "forget HOST",
		Short:   "Forget a host that is gone",
		Long:    "Take a host that is gone out of the list of `pentad fleet status`. One that lives reports anew.",
		Example: "  pentad fleet forget db-7",
		Args:    wants("HOST"),
	}
	addConfigFlag(cmd, &file)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withStore(cmd, file, func(ctx context.Context, store etcd.Objects) error {
			was, err := store.Forget(ctx, args[0])
			if err == nil && !was {
				err = fmt.Errorf("the fleet has no host %s; `pentad fleet status` lists them", args[0])
			}
			return err
		})
	}
	return cmd
}
